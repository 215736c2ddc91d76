"""`tunery db`: on PostgreSQL 18 and 15, with a superuser and with a role that may just create roles and databases."""

import os
import pty
import resource
import secrets
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.servers import temporary_home
from tunery import bootstrap, node_logins
from tunery.db_commands import keep_secrets, read_env
from tunery.embedded import binaries, ports
from tunery.embedded.servers import External, Servers

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
OPTIONS = ("fsync=off", "full_page_writes=off")
UNUSED = External(redis_url="redis://x", s3_endpoint_url="http://x", s3_access_key_id="x", s3_secret_access_key="x")


@pytest.fixture(scope="module", params=["wheel", "15"])
def admin_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A superuser of a server of its own: roles belong to a whole server."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "15":
            if not (DEBIAN_15 / "initdb").exists():
                pytest.skip("PostgreSQL 15 of Debian is not installed")
            patch.setitem(
                binaries.FINDERS, "postgres", lambda: binaries.Program("postgres", DEBIAN_15 / "postgres", "PATH")
            )
        home = temporary_home()
        servers = Servers(home, UNUSED, OPTIONS)
        servers.start()
    yield servers.admin_url
    servers.stop()
    shutil.rmtree(home.root)


@pytest.fixture(params=["superuser", "creator"])
def admin(request: pytest.FixtureRequest, admin_url: str) -> Iterator[str]:
    """Each finds a server without any role of ours."""
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS creator")
        connection.execute("CREATE ROLE creator LOGIN CREATEROLE CREATEDB PASSWORD 'of the creator'")
    yield admin_url if request.param == "superuser" else bootstrap.url_for(admin_url, "creator", "of the creator")
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {bootstrap.DATABASE} WITH (FORCE)")
        ours = connection.execute("SELECT rolname FROM pg_roles WHERE rolname LIKE 'tunery\\_%'").fetchall()
        for (role,) in [*ours, ("creator",)]:
            connection.execute(f"DROP OWNED BY {role} CASCADE".encode())
        for (role,) in [*ours, ("creator",)]:
            connection.execute(f"DROP ROLE {role}".encode())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tunery.env"


def db(command: str, file: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TUNERY_", "PG"))}
    return subprocess.run(
        [sys.executable, "-m", "tunery.cli", "db", command, "--env-file", str(file), *arguments],
        env=clean | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_server_is_prepared_and_repeating_changes_nothing(admin: str, file: Path) -> None:
    done = db("init", file, TUNERY_ADMIN_DATABASE_URL=admin)
    assert done.returncode == 0, done.stderr
    assert "tunery up -d" in done.stderr and "warning" not in done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    first, values = file.read_text(), read_env(file)
    assert not any(value in done.stdout + done.stderr for name, value in values.items() if "PASSWORD" in name)
    assert values["TUNERY_API_KEY"].startswith("ftk_live_")
    assert "@" not in values["TUNERY_DATABASE_URL"]
    for role in bootstrap.LOGIN_ROLES:
        psycopg.connect(values[f"{role.upper()}_DATABASE_URL"]).close()
    assert db("init", file, TUNERY_ADMIN_DATABASE_URL=admin).returncode == 0
    assert file.read_text() == first
    assert db("upgrade", file).stderr.startswith("the schema is at ")
    assert "(the newest)" in db("status", file).stdout
    _a_node_gets_a_login(values["TUNERY_MIGRATE_DATABASE_URL"])


def _a_node_gets_a_login(url: str) -> None:
    """Whoever prepared the server, superuser or not: a login that a node may use, and that ends."""
    node = uuid.uuid4()
    login = node_logins.login_of(node)
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("SET ROLE tunery_owner")
        verifier = owner.pgconn.encrypt_password(b"secret", login.encode(), b"scram-sha-256").decode()
        if owner.info.server_version < bootstrap.OLDEST_TO_JOIN * 10000:
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                owner.execute("SELECT create_node_login(%s, %s)", [node, verifier])
            return
        owner.execute("SELECT create_node_login(%s, %s)", [node, verifier])
        with psycopg.connect(bootstrap.url_for(url, login, "secret")) as connection:
            assert connection.execute("SELECT app_node()").fetchone() == (node,)
        owner.execute("SELECT close_node_login(%s)", [node])
        owner.execute("SELECT drop_node_login(%s)", [node])
        assert owner.execute("SELECT FROM pg_roles WHERE rolname = %s", [login]).fetchone() is None


def test_password_comes_by_variable_or_terminal_and_a_warning_if_by_argument(admin_url: str, file: Path) -> None:
    password = psycopg.conninfo.conninfo_to_dict(admin_url)["password"]
    without = bootstrap.url_for(admin_url).replace(f":{password}@", "@")
    refused = db("init", file, "--admin-url", without)
    assert refused.returncode == 1 and "no password supplied" in refused.stderr
    assert db("init", file, "--admin-url", without, PGPASSWORD=str(password)).returncode == 0
    warned = db("init", file, "--admin-url", admin_url)
    assert warned.returncode == 0 and "warning: the password in --admin-url" in warned.stderr
    assert _at_a_terminal(file, without, str(password)) == 0


def _at_a_terminal(file: Path, url: str, password: str) -> int:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tunery.cli", "db", "init", "--env-file", str(file), "--admin-url", url]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_controlling_terminal
    )
    os.close(theirs)
    said = b""
    while b"Password of postgres:" not in said:
        said += os.read(ours, 1000)
    os.write(ours, password.encode() + b"\n")
    try:
        while part := os.read(ours, 1000):
            said += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert password.encode() not in said
    return process.wait(30)


def _controlling_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def refusal(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    assert done.returncode == 1
    lines = [
        line.partition(": ") for line in done.stderr.splitlines() if line[:5] in ("error", "why: ", "fix: ", "docs:")
    ]
    return {name: text.strip() for name, _, text in lines}


def test_refusals_say_what_is_wrong_and_how_to_mend_it(admin_url: str, file: Path) -> None:
    wrong = refusal(db("init", file, TUNERY_ADMIN_DATABASE_URL=bootstrap.url_for(admin_url, "postgres", "not it")))
    assert "password authentication failed" in wrong["why"] and "check user and password" in wrong["fix"]
    assert "not it" not in str(wrong)

    port = ports.choose(set())
    nobody = refusal(db("init", file, TUNERY_ADMIN_DATABASE_URL=f"postgresql://postgres:x@127.0.0.1:{port}/tunery"))
    assert f"check that PostgreSQL runs at 127.0.0.1:{port}" in nobody["fix"]

    assert "--admin-url postgresql://" in refusal(db("init", file))["fix"]
    assert "--admin-url postgresql://" in refusal(db("init", file, "--admin-url", "mysql://localhost/x"))["fix"]
    assert "percent-encode" in refusal(db("init", file, "--admin-url", "postgresql://a@host:port/x"))["fix"]
    assert "TUNERY_MIGRATE_DATABASE_URL" in refusal(db("upgrade", file.with_name("none.env")))["why"]

    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE powerless LOGIN PASSWORD 'powerless'")
    powerless = refusal(
        db("init", file, TUNERY_ADMIN_DATABASE_URL=bootstrap.url_for(admin_url, "powerless", "powerless"))
    )
    assert "role 'powerless': permission denied" in powerless["why"] and "CREATEROLE and CREATEDB" in powerless["fix"]


def test_server_that_is_too_old_is_refused(admin_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "OLDEST_POSTGRES", 99)
    with pytest.raises(bootstrap.Unsuitable, match=r"the server is PostgreSQL 1\d\.\d+; 99 or later is needed"):
        bootstrap.create_roles(admin_url, {role: secrets.token_urlsafe() for role in bootstrap.LOGIN_ROLES})


def test_a_file_of_secrets_is_closed_to_others_and_outlives_a_full_disk(tmp_path: Path) -> None:
    file = tmp_path / "tunery.env"
    file.write_text("TUNERY_KEY_PEPPER='old'\n")
    file.chmod(0o644)
    known, passwords = keep_secrets(file)
    assert file.stat().st_mode & 0o777 == 0o600
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # as a disk that is full after ten bytes
    try:
        with pytest.raises(OSError):
            keep_secrets(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert keep_secrets(file) == (known, passwords)

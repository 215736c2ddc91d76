"""Embedded S3: SeaweedFS in one process, with its telemetry off and its open doors shut."""

import http.client
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tunery.embedded import binaries, ports
from tunery.embedded.home import Home
from tunery.embedded.process import Child, Command

BUCKET = "tunery"
REGION = "us-east-1"
READY = "ready"
"""An object that every start reads. Nothing of ours lies beside `u/` and `a/`."""
PORTS = ("s3", "filer", "master", "volume", "admin")
GRPC_OFFSET = 10000
_UNIX_PATH_LIMIT = 100
SIGNING = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")


class Key(NamedTuple):
    access_key_id: str
    secret_access_key: str


class Objects:
    """Three identities: root for the api, one for nodes that may write below `a/` only, one that lists and deletes."""

    name = "s3"

    def __init__(self, home: Home, known_ports: dict[str, int], allowed_origins: Sequence[str] = ()) -> None:
        self.home, self.ports, self.allowed_origins = home, known_ports, allowed_origins
        self.program = binaries.find("s3")
        secrets = home.secrets()
        self.root = Key(secrets.made("s3_root_id", 12), secrets.made("s3_root_secret"))
        self.signing = {name: secrets.made(f"s3_{name}") for name in SIGNING}
        self.node = Key(secrets.made("s3_node_id", 12), secrets.made("s3_node_secret"))
        self.tidy = Key(secrets.made("s3_tidy_id", 12), secrets.made("s3_tidy_secret"))

    @property
    def endpoint_url(self) -> str:
        return f"http://{ports.HOST}:{self.ports['s3']}"

    def prepare(self) -> Child:
        folder = self.home.owned_folder("s3")
        (data := folder / "data").mkdir(exist_ok=True)
        data.chmod(0o700)
        self.home.run_as.own(data)
        self.home.owned_file(folder / "security.toml", security(self.signing))
        self.home.owned_file(folder / "identities.json", json.dumps(identities(self.root, self.node, self.tidy)))
        command = Command(
            name=self.name,
            argv=[binaries.placed(self.program, self.home), *self._arguments()],
            environment={
                "PATH": os.environ.get("PATH", os.defpath),
                "LC_ALL": "C",
                "HOME": str(folder),
                "GOMEMLIMIT": "384MiB",  # without it 700 MB stay resident after one large upload
            },
            cwd=folder,
            run_as=self.home.run_as,
            stop_wait_s=15,  # it has been seen to take more than ten; a kill loses nothing that was acknowledged
        )
        return Child(command, self.home.logs / "s3.log", self._ready)

    def _arguments(self) -> list[str]:
        folder = self.home.data / "s3"
        listening = [f"-{name}.port={port}" for name, port in self.ports.items()]
        grpc = [f"-{name}.port.grpc={port + GRPC_OFFSET}" for name, port in self.ports.items()]
        sockets = [f"-{name}.localSocket={folder / name}.sock" for name in ("filer", "s3")]
        if len(f"{folder}/filer.sock") > _UNIX_PATH_LIMIT:
            sockets = []  # then they lie in /tmp, under the same credentials
        return [
            f"-config_dir={folder}",  # before the subcommand, or it is not read
            "-logtostderr=true",
            "mini",
            f"-dir={folder / 'data'}",
            *(f"-ip={ports.HOST}", f"-ip.bind={ports.HOST}"),
            *("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.iam=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0"),
            f"-s3.config={folder / 'identities.json'}",
            f"-s3.allowedOrigins={','.join(self.allowed_origins) or 'http://127.0.0.1'}",
            "-filer.allowedOrigins=http://127.0.0.1",
            *listening,
            *grpc,
            *sockets,
        ]

    def _ready(self) -> bool:
        return bucket_ready(self.endpoint_url, self.root)


def security(signing: Mapping[str, str]) -> str:
    """`security.toml`. Without these keys the filer hands every tenant's object to any local process that asks."""
    return "".join(f'[{name}]\nkey = "{key}"\n' for name, key in signing.items())


def identities(root: Key, node: Key, tidy: Key) -> dict[str, object]:
    """`identities.json`: who may do what."""
    node_may = [f"Read:{BUCKET}/u/*", f"Read:{BUCKET}/a/*", f"Write:{BUCKET}/a/*", f"List:{BUCKET}/a/*"]
    # this server has nothing narrower: deleting needs Write, and listing unfinished uploads needs Read
    tidy_may = [f"List:{BUCKET}", f"Read:{BUCKET}", f"Write:{BUCKET}/u/*", f"Write:{BUCKET}/a/*"]
    return {
        "identities": [
            _identity("root", root, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("node", node, node_may),
            _identity("tidy", tidy, tidy_may),
        ]
    }


def bucket_ready(endpoint_url: str, root: Key) -> bool:
    """Ready is: the bucket is there, and what lies in it can be read. A first start makes both.

    The volumes are known a moment after the S3 port answers; until then every object is an internal error.
    """
    try:
        status, _ = signed("HEAD", endpoint_url, root)
        if status == 404:
            status, _ = signed("PUT", endpoint_url, root)
        if status != 200:
            return False
        status, _ = signed("GET", endpoint_url, root, object_key=READY)
        if status == 404:
            status, _ = signed("PUT", endpoint_url, root, object_key=READY, body=READY.encode())
    except OSError:
        return False
    return status == 200


def signed(
    method: str,
    endpoint_url: str,
    key: Key,
    bucket: str = BUCKET,
    region: str = REGION,
    timeout_s: float = 5,
    object_key: str = "",
    body: bytes = b"",
) -> tuple[int, str | None]:
    """Status and date of the answer to a request for the bucket, or an object in it. OSError when there is none.

    boto3 itself would cost as long to import as the server takes to start.
    """
    place = urlsplit(f"{endpoint_url.rstrip('/')}/{bucket}" + (f"/{object_key}" if object_key else ""))
    request = AWSRequest(method=method, url=place.geturl(), data=body)
    auth = S3SigV4Auth if object_key else SigV4Auth
    auth(Credentials(*key), "s3", region).add_auth(request)
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = kind(place.hostname or ports.HOST, place.port, timeout=timeout_s)
    try:
        connection.request(method, place.path, body=body or None, headers=dict(request.headers.items()))
        answer = connection.getresponse()
        return answer.status, answer.headers["date"]
    except http.client.HTTPException as error:
        raise OSError(f"not an HTTP answer: {error!r}") from error
    finally:
        connection.close()


def _identity(name: str, key: Key, actions: list[str]) -> dict[str, object]:
    credentials = {"accessKey": key.access_key_id, "secretKey": key.secret_access_key}
    return {"name": name, "credentials": [credentials], "actions": actions}

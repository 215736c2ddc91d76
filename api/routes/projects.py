"""`/v1/projects`, `/v1/organization`: what each may have of the GPUs. Projects read their own, admins set all."""

from fastapi import APIRouter, Depends

from api import pages
from api.deps import Scope, SessionDep, Tenant, TenantDep
from api.documentation import problems
from api.schemas.cluster import (
    NamedOut,
    OrganizationOut,
    ProjectIn,
    ProjectNameOut,
    ProjectOut,
    ShareIn,
    organization_out,
    project_out,
)
from api.schemas.common import Page
from tunery import ids, shares
from tunery.errors import NotFound
from tunery.shares import Known

router = APIRouter(tags=["Projects"])
ANY, ADMIN = [Depends(Scope(None))], [Depends(Scope("admin"))]


@router.get("/v1/projects", dependencies=ADMIN)
def list_projects(session: SessionDep) -> Page[ProjectNameOut]:
    """Every project of the deployment, by organization and name."""
    return pages.page(shares.everybody(session), False, _name_out)


@router.get("/v1/projects/{project}", dependencies=ANY, responses=problems(404, 409))
def retrieve_project(project: str, tenant: TenantDep) -> ProjectOut:
    """By id, name or `organization:name`. A key without the scope `admin` finds its own project and no other."""
    known = _find(tenant, project)
    with tenant.of(known.id).transaction() as session:
        return project_out(shares.of_project(session, known.id), shares.capacity(session))


@router.patch("/v1/projects/{project}", dependencies=ADMIN, responses=problems(400, 404, 409))
def change_project(project: str, body: ProjectIn, tenant: TenantDep) -> ProjectOut:
    """Set its weight, guarantee, cap or limit. More guarantees than there are GPUs are refused, with the numbers."""
    known = _find(tenant, project)
    shares.change_project(tenant.sessions, tenant.actor, known, body.model_dump(exclude_unset=True))
    with tenant.of(known.id).transaction() as session:
        return project_out(shares.of_project(session, known.id), shares.capacity(session))


@router.get("/v1/organization", dependencies=ANY)
def retrieve_organization(tenant: TenantDep, session: SessionDep) -> OrganizationOut:
    """The one that the key's project belongs to."""
    return organization_out(shares.of_project(session, tenant.project_id).organization)


@router.patch("/v1/organization", dependencies=ADMIN, responses=problems(400))
def change_organization(body: ShareIn, tenant: TenantDep) -> OrganizationOut:
    """Set what all its projects together may have. Projects share it among themselves by their own weights."""
    return _change_organization(tenant, tenant.identity.organization, body)


@router.get("/v1/organizations/{organization}", dependencies=ADMIN, responses=problems(404))
def retrieve_any_organization(organization: str, tenant: TenantDep, session: SessionDep) -> OrganizationOut:
    """Any, by id or name."""
    known = shares.find_organization(session, organization)
    with tenant.of(known.id).transaction() as inside:
        return organization_out(shares.of_project(inside, known.id).organization)


@router.patch("/v1/organizations/{organization}", dependencies=ADMIN, responses=problems(400, 404))
def change_any_organization(organization: str, body: ShareIn, tenant: TenantDep) -> OrganizationOut:
    """Any, by id or name."""
    return _change_organization(tenant, organization, body)


def _change_organization(tenant: Tenant, wanted: str, body: ShareIn) -> OrganizationOut:
    with tenant.transaction() as session:
        known = shares.find_organization(session, wanted)
    shares.change_organization(tenant.sessions, tenant.actor, known, body.model_dump(exclude_unset=True))
    with tenant.of(known.id).transaction() as session:
        return organization_out(shares.of_project(session, known.id).organization)


def _find(tenant: Tenant, wanted: str) -> Known:
    """For a key that is no admin's another project does not exist, whatever it is called."""
    who = tenant.identity
    with tenant.transaction() as session:
        if "admin" in who.scopes:
            return shares.find(session, wanted)
        if wanted not in (ids.encode(ids.PROJECT, who.project_id), who.project, f"{who.organization}:{who.project}"):
            raise NotFound(f"No such project: '{wanted[:80]}'", param="project", fix="`tunery whoami` names yours.")
        own = shares.of_project(session, who.project_id).project
    return Known(own.id, own.name, own.status, who.organization_id, who.organization, own.guarantee)


def _name_out(one: Known) -> ProjectNameOut:
    return ProjectNameOut(
        id=ids.encode(ids.PROJECT, one.id),
        name=one.name,
        organization=NamedOut(id=ids.encode(ids.ORGANIZATION, one.organization_id), name=one.organization),
        status=one.status,
        guarantee=one.guarantee,
    )

"""Users and roles of an etcd, made what `rights` says. For an administrator's credentials."""

from collections.abc import Sequence

from clustermesh.etcd import EtcdKV
from clustermesh.etcdpb import etcd_pb2 as pb
from clustermesh.kv import KVError
from clustermesh.rights import Right, Role

_KINDS = {"read": pb.Permission.READ, "readwrite": pb.Permission.READWRITE}


async def apply(kv: EtcdKV, roles: Sequence[Role]) -> list[str]:
    """Make users and roles exist with exactly these rights; what was done, a line each. Raises KVError.

    Rights that a role has beyond these are taken away; other roles of a user are left to him.
    """
    done: list[str] = []
    for role in roles:
        if await _absent(kv, "RoleGet", pb.AuthRoleGetRequest(role=role.name)):
            await kv.auth("RoleAdd", pb.AuthRoleAddRequest(name=role.name))
            done.append(f"role {role.name} added")
        done += await _rights(kv, role)
        for user in role.users:
            done += await _user(kv, user, role.name)
    return done


async def _rights(kv: EtcdKV, role: Role) -> list[str]:
    reply = await kv.auth("RoleGet", pb.AuthRoleGetRequest(role=role.name))
    present = {(one.permType, one.key.decode(), one.range_end.decode()) for one in reply.perm}
    wanted = {(_KINDS[one.access], one.key, one.end): one for one in role.rights}
    done = []
    for kind, key, end in sorted(present - wanted.keys()):
        request = pb.AuthRoleRevokePermissionRequest(role=role.name, key=key.encode(), range_end=end.encode())
        await kv.auth("RoleRevokePermission", request)
        done.append(f"role {role.name}: {pb.Permission.Type.Name(kind).lower()} of {key} revoked")
    for place, one in wanted.items():
        if place not in present:
            await kv.auth("RoleGrantPermission", _grant(role.name, one))
            done.append(f"role {role.name}: {one.access} of {one.key} granted")
    return done


def _grant(role: str, one: Right) -> pb.AuthRoleGrantPermissionRequest:
    permission = pb.Permission(permType=_KINDS[one.access], key=one.key.encode(), range_end=one.end.encode())
    return pb.AuthRoleGrantPermissionRequest(name=role, perm=permission)


async def _user(kv: EtcdKV, user: str, role: str) -> list[str]:
    done = []
    if await _absent(kv, "UserGet", pb.AuthUserGetRequest(name=user)):
        options = pb.UserAddOptions(no_password=True)
        await kv.auth("UserAdd", pb.AuthUserAddRequest(name=user, options=options))
        done.append(f"user {user} added")
    reply = await kv.auth("UserGet", pb.AuthUserGetRequest(name=user))
    if role not in reply.roles:
        await kv.auth("UserGrantRole", pb.AuthUserGrantRoleRequest(user=user, role=role))
        done.append(f"user {user} has role {role}")
    return done


async def _absent(kv: EtcdKV, method: str, request: object) -> bool:
    try:
        await kv.auth(method, request)
    except KVError as error:
        if "not found" in str(error):
            return True
        raise
    return False

"""What the loopback Hub answers to each request."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

from hub import bodies
from hub.repositories import Commit, HubError, Refused, Repository, upload_mode


@dataclass(frozen=True)
class User:
    """Who a token stands for."""

    name: str
    write: bool = True


@dataclass(frozen=True)
class Request:
    """One request with its whole body. `path` is as sent, without the query."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: User | None = None

    def flag(self, name: str) -> bool:
        """A yes or no of the query."""
        value = self.query.get(name, ["false"])[0].lower()
        bodies.check_choice(name, value, ("true", "false", "1", "0"))
        return value in ("true", "1")


@dataclass
class Response:
    """One answer."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value, status: int = 200, headers: dict | None = None, type: str = "application/json") -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": type, **(headers or {})})


def error_response(error: HubError) -> Response:
    headers = {"X-Error-Message": error.message.encode("ascii", "replace").decode()}
    if error.code:
        headers["X-Error-Code"] = error.code
    return json_response({"error": error.message}, error.status, headers)


# An id without a namespace can be asked for; no such repository exists here.
PLACEHOLDERS = {
    "{types}": "(?P<types>models|datasets)",
    "{prefix}": "(?P<prefix>(?:datasets/)?)",
    "{id}": "(?P<id>[^/]+(?:/[^/]+)?)",
    "{revision}": "(?P<revision>[^/]+)",
    "{name}": "(?P<name>[^/]+)",
    "{oid}": "(?P<oid>[^/]+)",
    "{path}": "(?P<path>.+)",
}
ROUTES: list[tuple[tuple[str, ...], re.Pattern, Callable]] = []


def route(methods: str, path: str):
    """Registers a function for requests to `path`. The first of all routes that match answers."""
    for placeholder, pattern in PLACEHOLDERS.items():
        path = path.replace(placeholder, pattern)

    def register(function):
        ROUTES.append((tuple(methods.split()), re.compile(path), function))
        return function

    return register


def dispatch(hub, request: Request) -> Response:
    """Calls the route's function with the decoded parts of the path."""
    for methods, pattern, function in ROUTES:
        match = pattern.fullmatch(request.path)
        if match and request.method in methods:
            parts = {name: part and unquote(part) for name, part in match.groupdict().items()}
            return function(hub, request, **parts)
    raise Refused(404, "no such route")


def find_repository(hub, request: Request, type: str, id: str) -> Repository:
    """The repository, if the user may see it."""
    repository = hub.repositories.get((type, id))
    if repository is None or (repository.private and (request.user is None or request.user.name != repository.owner)):
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repository


def require_writer(request: Request, namespace: str | None):
    """Only the owner of a namespace writes there. Without a namespace, any user who may write at all."""
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if not request.user.write:
        raise HubError(403, "this token can only read")
    if namespace not in (None, request.user.name):
        raise HubError(403, f"{request.user.name} cannot write to the namespace {namespace}")


def find_writable(hub, request: Request, type: str, id: str, pull_request: bool = False) -> Repository:
    """The repository, if the user may change it. Pull requests are open to everybody who sees it."""
    repository = find_repository(hub, request, type, id)
    require_writer(request, None if pull_request else repository.owner)
    return repository


def is_pull_request(request: Request, revision: str) -> bool:
    return revision.startswith("refs/pr/") or request.flag("create_pr")


def web_url(hub, repository: Repository) -> str:
    return f"{hub.url}/{'datasets/' if repository.type == 'dataset' else ''}{repository.id}"


@route("GET", "/api/whoami-v2")
def whoami(hub, request):
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    role = "write" if request.user.write else "read"
    token = {"displayName": "token", "role": role}
    name = request.user.name
    return json_response({"type": "user", "name": name, "fullname": name, "orgs": [], "auth": {"accessToken": token}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request):
    bodies.read_json(request.body, {"content": str, "repoType": str})
    return json_response({"errors": [], "warnings": []})


@route("POST", "/api/repos/create")
def create_repository(hub, request):
    value = bodies.read_repository(request.body, {"visibility": str})
    bodies.check_choice("visibility", value.get("visibility", "public"), ("public", "private"))
    require_writer(request, value["organization"])
    id = f"{request.user.name}/{value['name']}"
    exists = (value["type"], id) in hub.repositories
    if not exists:
        private = value.get("visibility") == "private"
        hub.repositories[value["type"], id] = Repository(id, value["type"], private)
    answer = {"url": web_url(hub, hub.repositories[value["type"], id]), "name": id, "id": id}
    if exists:
        return json_response({"error": "You already created this repo", **answer}, 409)
    return json_response(answer)


@route("DELETE", "/api/repos/delete")
def delete_repository(hub, request):
    value = bodies.read_repository(request.body, {})
    require_writer(request, None)
    id = f"{value['organization'] or request.user.name}/{value['name']}"
    find_writable(hub, request, value["type"], id)
    del hub.repositories[value["type"], id]
    return Response(200)


@route("PUT", "/api/{types}/{id}/settings")
def change_settings(hub, request, types, id):
    repository = find_writable(hub, request, types.removesuffix("s"), id)
    value = bodies.read_json(request.body, {}, bodies.SETTINGS)
    bodies.check_choice("visibility", value.get("visibility", "public"), ("public", "private"))
    bodies.check_choice("gated", value.get("gated", False), ("auto", "manual", False))
    if "visibility" in value:
        repository.private = value["visibility"] == "private"
    if "gated" in value:
        repository.gated = bool(value["gated"])
    return json_response({"private": repository.private, "gated": repository.gated})


@route("GET", "/api/{types}/{id}/refs")
def list_refs(hub, request, types, id):
    repository = find_repository(hub, request, types.removesuffix("s"), id)

    def listed(refs, prefix=""):
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": oid} for name, oid in refs.items()]

    refs = {"branches": listed(repository.branches, "refs/heads/"), "tags": listed(repository.tags, "refs/tags/")}
    if request.flag("include_prs"):
        refs["pullRequests"] = listed(repository.pull_requests)
    return json_response({**refs, "converts": []})


@route("GET", "/api/{types}/{id}/commits/{revision}")
def list_commits(hub, request, types, id, revision):
    repository = find_repository(hub, request, types.removesuffix("s"), id)
    authors = [{"user": repository.owner}]
    return json_response(
        [
            {"id": commit.oid, "title": commit.message, "message": "", "date": commit.date, "authors": authors}
            for commit in repository.history(revision)
        ]
    )


@route("GET", "/api/{types}/{id}/tree/{revision}(?:/{path})?")
def list_tree(hub, request, types, id, revision, path):
    repository = find_repository(hub, request, types.removesuffix("s"), id)
    commit = repository.at(revision)
    return json_response(repository.tree(commit, path, request.flag("recursive"), request.flag("expand")))


@route("POST", "/api/{types}/{id}/paths-info/{revision}")
def paths_info(hub, request, types, id, revision):
    repository = find_repository(hub, request, types.removesuffix("s"), id)
    commit = repository.at(revision)
    paths, expand = bodies.read_paths(request.body)
    entries = {entry["path"]: entry for entry in repository.tree(commit, "", recursive=True, expand=expand)}
    return json_response([entries[path] for path in paths if path in entries])


@route("POST", "/api/{types}/{id}/branch/{name}")
def create_branch(hub, request, types, id, name):
    repository = find_writable(hub, request, types.removesuffix("s"), id)
    value = bodies.read_json(request.body, {}, {"startingPoint": str})
    repository.create_branch(name, value.get("startingPoint", "main"))
    return Response(200)


@route("POST", "/api/{types}/{id}/tag/{revision}")
def create_tag(hub, request, types, id, revision):
    repository = find_writable(hub, request, types.removesuffix("s"), id)
    value = bodies.read_json(request.body, {"tag": str}, {"message": str})
    repository.create_tag(value["tag"], revision)
    return Response(200)


@route("DELETE", "/api/{types}/{id}/(?P<kind>branch|tag)/{name}")
def delete_ref(hub, request, types, id, kind, name):
    repository = find_writable(hub, request, types.removesuffix("s"), id)
    refs = repository.branches if kind == "branch" else repository.tags
    if name not in refs:
        raise HubError(404, f"{id} has no {kind} {name}", "RevisionNotFound")
    if (kind, name) == ("branch", "main"):
        raise HubError(403, "main cannot be deleted")
    del refs[name]
    return Response(200)


@route("POST", "/api/{types}/{id}/preupload/{revision}")
def plan_upload(hub, request, types, id, revision):
    repository = find_writable(hub, request, types.removesuffix("s"), id, is_pull_request(request, revision))
    commit = repository.at(revision)
    files = []
    for file in bodies.read_upload_plan(request.body):
        path, mode = file["path"], upload_mode(file["path"], file["size"])
        oid = {"oid": commit.stored_oid(path)} if path in commit.files else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return json_response({"files": files})


@route("POST", "/api/{types}/{id}/commit/{revision}")
def commit(hub, request, types, id, revision):
    repository = find_writable(hub, request, types.removesuffix("s"), id, is_pull_request(request, revision))
    message, parent, operations = bodies.read_commit(request.body)
    new, ref = repository.commit(revision, message, operations, parent, request.flag("create_pr"))
    url = web_url(hub, repository)
    answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{url}/commit/{new.oid}"}
    if request.flag("create_pr"):
        answer["pullRequestUrl"] = f"{url}/discussions/{ref.rsplit('/', 1)[1]}"
    return json_response(answer)


@route("GET", "/api/{types}/{id}(?:/revision/{revision})?")
def repository_info(hub, request, types, id, revision):
    repository = find_repository(hub, request, types.removesuffix("s"), id)
    commit = repository.at(revision or "main")
    return json_response(
        {
            "id": id,
            "author": repository.owner,
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": [_sibling(repository, commit, path, request.flag("blobs")) for path in sorted(commit.files)],
            **_card_fields(commit),
        }
    )


def _sibling(repository: Repository, commit: Commit, path: str, blobs: bool) -> dict:
    if not blobs:
        return {"rfilename": path}
    entry = repository.file_entry(commit, path)
    sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
    if "lfs" in entry:
        sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
    return sibling


def _card_fields(commit: Commit) -> dict:
    """What the Hub reads from the model card and clients ask for."""
    fields = {}
    head = re.match(r"---\n(.*?)\n---", commit.files.get("README.md", b"").decode(errors="replace"), re.DOTALL)
    for name in ("library_name", "pipeline_tag"):
        if head and (line := re.search(rf"^{name}: *(\S+) *$", head[1], re.MULTILINE)):
            fields[name] = line[1]
    return fields


@route("POST", "/{prefix}{id}.git/info/lfs/objects/batch")
def lfs_batch(hub, request, prefix, id):
    objects, revision = bodies.read_lfs_batch(request.body)
    # Objects of a new pull request are announced without a branch.
    pull_request = revision is None or revision.startswith("refs/pr/")
    repository = find_writable(hub, request, "dataset" if prefix else "model", id, pull_request)
    if revision is not None:
        repository.at(revision)
    answers = []
    for item in objects:
        answer = dict(item)
        if item["oid"] not in repository.lfs_objects:
            grant = repository.grant_upload(item["oid"], item["size"])
            href = f"{web_url(hub, repository)}.git/lfs/{item['oid']}?grant={grant}"
            answer["actions"] = {"upload": {"href": href, "header": {}}}
        answers.append(answer)
    return json_response({"transfer": "basic", "objects": answers}, type="application/vnd.git-lfs+json")


@route("PUT", "/{prefix}{id}.git/lfs/{oid}")
def lfs_upload(hub, request, prefix, id, oid):
    # As with a signed address, the grant stands for the user.
    repository = hub.repositories.get(("dataset" if prefix else "model", id))
    if repository is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    repository.upload(request.query.get("grant", [""])[0], oid, request.body)
    return Response(200)


@route("GET HEAD", "/{prefix}{id}/resolve/{revision}/{path}")
def resolve_file(hub, request, prefix, id, revision, path):
    repository = find_repository(hub, request, "dataset" if prefix else "model", id)
    if repository.gated and (request.user is None or request.user.name != repository.owner):
        status = 401 if request.user is None else 403
        raise HubError(status, f"Access to {repository.type} {id} is restricted", "GatedRepo")
    commit = repository.at(revision)
    if path not in commit.files:
        response = error_response(HubError(404, f"{path} does not exist", "EntryNotFound"))
        response.headers["X-Repo-Commit"] = commit.oid
        return response
    content, oid = commit.files[path], commit.stored_oid(path)
    headers = {
        "Content-Type": "application/octet-stream",
        "ETag": f'"{oid}"',
        "X-Repo-Commit": commit.oid,
        "Accept-Ranges": "bytes",
    }
    if path in commit.lfs:
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
    wanted = request.headers.get("range")
    if wanted is None or request.method == "HEAD":
        return Response(200, content, headers)
    return _part(content, wanted, headers)


def _part(content: bytes, wanted: str, headers: dict[str, str]) -> Response:
    """The bytes that the header Range asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if match is None or match.groups() == ("", ""):
        raise Refused(400, f"not a range: {wanted}")
    first, last = match.groups()
    size = len(content)
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Response(416, b"", {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(206, content[start:stop], headers)

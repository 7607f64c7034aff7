"""A small local Hub: what of the Hugging Face Hub's HTTP API an unmodified `huggingface_hub` client needs.

Model and dataset repos live in memory and disappear with the server. Uploads are regular (base64 in the commit), or
basic Git LFS for the patterns of `.gitattributes` once `hub.lfs` is true, which wants a client with
HF_HUB_DISABLE_XET=1. Left out: Xet, multipart LFS, pagination, `expand`, pull requests, spaces, `.gitignore` rules.
"""

import hashlib
import json
import os
import re
import socket
import threading
import time
from fnmatch import fnmatch
from typing import Any, Literal
from urllib.parse import parse_qs, unquote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .repos import Commit, File, HubError, Repo, card, changed, folders, lfs_info, path_info

LFS_PATTERNS = ("*.bin", "*.parquet", "*.safetensors", "*.npz", "*.arrow", "*.zip")
GITATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS).encode()


class Hub:
    """The server, started and stopped by `with Hub() as hub`.

    User `me` has `token` and user `other` has `other_token`; each may write in the own namespace. `requests` lists
    "METHOD path" of everything that came in, with the Range header behind it where there was one.
    """

    token, other_token = "local-token-me", "local-token-other"

    def __init__(self) -> None:
        self.users = {self.token: "me", self.other_token: "other"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.lfs = False
        self._failures: list[list[Any]] = []
        self._transports: dict[Any, Any] = {}
        api, web, data = "/api/{kind}/{ns}/{name}", "/{ns}/{name}", "/datasets/{ns}/{name}"
        table = [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("DELETE", "/api/repos/delete", self._delete),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("GET", api, self._info),
            ("GET", api + "/revision/{rev}", self._info),
            ("PUT", api + "/settings", self._settings),
            ("GET", api + "/tree/{rev}", self._tree),
            ("GET", api + "/tree/{rev}/{path:path}", self._tree),
            ("POST", api + "/paths-info/{rev}", self._paths_info),
            ("GET", api + "/commits/{rev}", self._commits),
            ("GET", api + "/refs", self._refs),
            *(("POST", api + ref, self._add_ref) for ref in ("/branch/{rev}", "/tag/{rev}")),
            *(("DELETE", api + ref, self._drop_ref) for ref in ("/branch/{rev}", "/tag/{rev}")),
            ("POST", api + "/preupload/{rev}", self._preupload),
            ("POST", api + "/commit/{rev}", self._commit),
            *(("POST", repo + ".git/info/lfs/objects/batch", self._lfs_batch) for repo in (data, web)),
            ("PUT", "/lfs/{kind}/{ns}/{name}/{oid}", self._lfs_put),
            *(("GET", repo + "/resolve/{rev}/{path:path}", self._resolve) for repo in (data, web)),
        ]
        routes = [Route(path, handler, methods=[method]) for method, path, handler in table]
        self._app = Starlette(routes=routes, exception_handlers={HubError: self._error})

    # ---- for tests

    def fail(self, pattern: str, how: int | Literal["cut"], times: int = 1) -> None:
        """Let the next `times` requests whose "METHOD path" matches the regular expression fail.

        A number is the HTTP status to answer. "cut" closes the connection: in a GET after half of the body has been
        sent, in all others in the middle of the request, which then has no effect.
        """
        self._failures.append([re.compile(pattern), how, times])

    def environment(self, home: str) -> dict[str, str]:
        """All variables of a process that is a client of this Hub, signed in as `me`, with its cache in `home`.

        It has to be another process, because huggingface_hub reads HF_ENDPOINT when imported. What is set for the real
        Hub does not leak in, and neither does a proxy.
        """
        dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "XDG_CACHE_HOME")
        return {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            **({"HF_HUB_DISABLE_XET": "1"} if self.lfs else {}),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Content by path, with the `.gitattributes` that every new repo has."""
        repo = self.repo(repo_id, repo_type)
        return {path: file.data for path, file in repo.commits[repo.resolve(revision)].files.items()}

    def __enter__(self) -> "Hub":
        transports = self._transports

        class Protocol(H11Protocol):
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                transports[self.client] = transport

        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        config = uvicorn.Config(
            self, http=Protocol, ws="none", lifespan="off", log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the local Hub did not start")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    # ---- every request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Routes see the path still quoted: a branch named a/b is one segment, a%2Fb.
        scope["path"] = scope["raw_path"].decode()
        line = f"{scope['method']} {scope['path']}"
        self.requests.append(f"{line} {Request(scope).headers.get('range', '')}".rstrip())
        failure = next((f for f in self._failures if f[2] > 0 and f[0].search(line)), None)
        how = failure[1] if failure else None
        if failure:
            failure[2] -= 1
        if how == "cut" and scope["method"] != "GET":
            await receive()  # the first piece of the request
            self._transports[scope["client"]].close()
        elif isinstance(how, int):
            await Request(scope, receive).body()
            error = HubError(how, "injected failure")
            await (await self._error(Request(scope), error))(scope, receive, send)
        else:
            await self._app(scope, receive, self._half(scope, send) if how else send)

    def _half(self, scope: Scope, send: Send) -> Send:
        async def send_half(message: Message) -> None:
            if message["type"] == "http.response.body":
                body = message["body"]
                await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
                self._transports[scope["client"]].close()
            else:
                await send(message)

        return send_half

    async def _error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HubError)
        return JSONResponse({"error": error.message}, error.status, error.headers)

    def _user(self, request: Request) -> str | None:
        header = request.headers.get("authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, request: Request, write: bool = False) -> Repo:
        """The repo a path names, if the user may see (and write) it."""
        params, user = request.path_params, self._user(request)
        kind = params.get("kind") or ("datasets" if request.url.path.startswith("/datasets/") else "models")
        repo = self.repos.get((kind.removesuffix("s"), f"{params['ns']}/{params['name']}"))
        if repo is None or (repo.private and user != repo.owner) or (write and user is None):
            # Over http the client tells a missing repo by this code only, not by the status.
            message = "Repository not found" if user else "Invalid username or password."
            raise HubError(404 if user else 401, message, "RepoNotFound")
        if write and user != repo.owner:
            raise HubError(403, f"You don't have the rights to write to {repo.id}")
        return repo

    def _at(self, request: Request) -> tuple[Repo, str, Commit]:
        repo = self._repo(request)
        oid = repo.resolve(unquote(request.path_params.get("rev", "main")))
        return repo, oid, repo.commits[oid]

    def _page(self, repo: Repo) -> str:
        return f"{self.url}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}"

    # ---- account and repos

    async def _whoami(self, request: Request) -> Response:
        user = self._user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
        return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    async def _validate_yaml(self, request: Request) -> Response:
        data, errors = card((await request.json())["content"])
        warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
        body = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return JSONResponse(body, 400 if errors else 200)

    async def _named(self, request: Request) -> tuple[tuple[str, str], dict[str, Any]]:
        user, body = self._user(request), await request.json()
        owner = body.get("organization") or user
        if user is None or owner != user:
            raise HubError(403 if user else 401, f'You don\'t have the rights to the namespace "{owner}"')
        return (body.get("type") or "model", f"{owner}/{body['name']}"), body

    async def _create(self, request: Request) -> Response:
        key, body = await self._named(request)
        old = self.repos.get(key)
        if old is not None:
            return JSONResponse({"error": f"You already created {key[0]} {key[1]}", "url": self._page(old)}, 409)
        if key[0] not in ("model", "dataset"):
            raise HubError(400, f"this local Hub has no repos of type {key[0]}")
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repo = self.repos[key] = Repo(key[1], key[0], private)
        repo.commit("main", "initial commit", "", {".gitattributes": File(GITATTRIBUTES, lfs=False)})
        return JSONResponse({"url": self._page(repo), "name": repo.id})

    async def _delete(self, request: Request) -> Response:
        key, _ = await self._named(request)
        if self.repos.pop(key, None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Response()

    async def _settings(self, request: Request) -> Response:
        repo, body = self._repo(request, write=True), await request.json()
        if "visibility" in body or "private" in body:
            repo.private = body.get("visibility") == "private" or bool(body.get("private"))
        repo.gated = body.get("gated", repo.gated)
        return JSONResponse({"private": repo.private, "gated": repo.gated})

    def _check_gate(self, request: Request, repo: Repo) -> None:
        user = self._user(request)
        if repo.gated and user != repo.owner and user not in repo.granted:
            message = f"Access to {repo.type} {repo.id} is restricted and you are not in the authorized list."
            raise HubError(403 if user else 401, message, "GatedRepo")

    # ---- reading

    async def _info(self, request: Request) -> Response:
        repo, oid, commit = self._at(request)
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if "blobs" in request.query_params:
                siblings[-1] |= {"size": len(file.data), "blobId": file.git_oid}
                siblings[-1] |= {"lfs": lfs_info(file, "sha256")} if file.lfs else {}
        readme = commit.files.get("README.md")
        about = card(readme.data.decode())[0] if readme else {}
        first = repo.history()[-1][1].date
        info = {"id": repo.id, "author": repo.owner, "sha": oid, "private": repo.private, "gated": repo.gated}
        info |= {"createdAt": first, "lastModified": commit.date, "tags": about.get("tags") or [], "cardData": about}
        return JSONResponse(info | {"siblings": siblings, "disabled": False, "downloads": 0, "likes": 0})

    async def _tree(self, request: Request) -> Response:
        _, oid, commit = self._at(request)
        root = unquote(request.path_params.get("path", ""))
        prefix = f"{root}/" if root else ""
        paths = sorted(path for path in folders(commit) | set(commit.files) if path.startswith(prefix))
        if root and not paths:
            raise HubError(404, f"{root} does not exist", "EntryNotFound", X_Repo_Commit=oid)
        if request.query_params.get("recursive", "false").lower() != "true":
            paths = [path for path in paths if "/" not in path[len(prefix) :]]
        return JSONResponse([path_info(commit, path) for path in paths])

    async def _paths_info(self, request: Request) -> Response:
        _, _, commit = self._at(request)
        asked = parse_qs((await request.body()).decode()).get("paths", [])
        known = folders(commit) | set(commit.files)
        return JSONResponse([path_info(commit, path) for path in asked if path in known])

    async def _resolve(self, request: Request) -> Response:
        repo, oid, commit = self._at(request)
        path = unquote(request.path_params["path"])
        if path not in (".gitattributes", "README.md"):
            self._check_gate(request, repo)
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", X_Repo_Commit=oid)
        size = len(file.data)
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if asked is None or asked.groups() == ("", ""):
            return Response(file.data, 200, headers, "application/octet-stream")
        first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first > last:
            return Response(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Response(file.data[first : last + 1], 206, headers, "application/octet-stream")

    # ---- revisions

    async def _commits(self, request: Request) -> Response:
        repo, oid, _ = self._at(request)
        log = []
        for key, commit in repo.history(oid):
            log.append({"id": key, "title": commit.title, "message": commit.message, "date": commit.date})
        return JSONResponse([entry | {"authors": [{"user": repo.owner}]} for entry in log])

    async def _refs(self, request: Request) -> Response:
        repo = self._repo(request)

        def listed(kind: str, known: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in known.items()]

        refs = {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags)}
        return JSONResponse(refs | {"converts": [], "pullRequests": []})

    async def _add_ref(self, request: Request) -> Response:
        # A branch is named in the path and its start in the body; for a tag it is the other way round.
        repo, body, named = self._repo(request, write=True), await request.json(), unquote(request.path_params["rev"])
        tag = body.get("tag")
        start = named if tag else body.get("startingPoint", "main")
        known, name = (repo.tags, tag) if tag else (repo.branches, named)
        if name in known:
            raise HubError(409, f"Reference already exists: {name}")
        known[name] = repo.resolve(start)
        return Response()

    async def _drop_ref(self, request: Request) -> Response:
        repo, name = self._repo(request, write=True), unquote(request.path_params["rev"])
        known = repo.tags if "/tag/" in request.url.path else repo.branches
        if known is repo.branches and name == "main":
            raise HubError(403, "Cannot delete the branch main")
        if known.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return Response()

    # ---- writing

    def _head(self, request: Request) -> tuple[Repo, str, str]:
        repo, branch = self._repo(request, write=True), unquote(request.path_params["rev"])
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if "create_pr" in request.query_params:
            raise HubError(400, "this local Hub has no pull requests")
        return repo, branch, repo.branches[branch]

    async def _preupload(self, request: Request) -> Response:
        repo, _, head = self._head(request)
        answer = []
        for path in (entry["path"] for entry in (await request.json())["files"]):
            lfs = self.lfs and any(fnmatch(path.split("/")[-1], pattern) for pattern in LFS_PATTERNS)
            old = repo.commits[head].files.get(path)
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append(entry | ({"oid": old.etag} if old else {}))
        return JSONResponse({"files": answer, "commitOid": head})

    async def _lfs_batch(self, request: Request) -> Response:
        repo, body = self._repo(request, write=True), await request.json()
        objects = []
        for entry in body["objects"]:
            href = f"{self.url}/lfs/{repo.type}s/{repo.id}/{entry['oid']}"
            known = entry["oid"] in repo.objects
            objects.append(entry | ({} if known else {"actions": {"upload": {"href": href}}}))
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _lfs_put(self, request: Request) -> Response:
        # As on the Hub the address itself is the permission: the client sends no token here.
        params, data = request.path_params, await request.body()
        oid = hashlib.sha256(data).hexdigest()
        if oid != params["oid"]:
            raise HubError(400, f"content has hash {oid}, not {params['oid']}")
        self.repos[params["kind"].removesuffix("s"), f"{params['ns']}/{params['name']}"].objects[oid] = data
        return Response()

    async def _commit(self, request: Request) -> Response:
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        repo, branch, head = self._head(request)
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = changed(repo.commits[head].files, repo.objects, lines[1:])
        oid = repo.commit(branch, header["summary"], header.get("description", ""), files)
        return JSONResponse({"success": True, "commitOid": oid, "commitUrl": f"{self._page(repo)}/commit/{oid}"})

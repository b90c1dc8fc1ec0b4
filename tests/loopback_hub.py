"""A small Hugging Face Hub on 127.0.0.1: what publishing and loading a model need of it, and failures on demand."""
import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional

import yaml

LICENSES = (None, 'apache-2.0', 'cc-by-nc-4.0', 'mit')  # a few of those that the Hub knows


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: What the Hub says in the body and in X-Error-Message.
        code: X-Error-Code, by which huggingface_hub tells missing files from missing repositories.
    """

    def __init__(self, status: int, message: str, code: str = ''):
        super().__init__(message)
        self.status = status
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}


@dataclass
class Failure:
    """What an endpoint does instead of its work.

    Attributes:
        status: Answer with this status and message.
        message: Message of that answer.
        delay: Seconds to wait before anything else.
        drop: Close the connection: 'before' the work, with half of the body read, or 'after' it, unanswered.
        times: Requests it applies to, all where None.
        headers: More headers of that answer.
    """

    status: Optional[int] = None
    message: str = ''
    delay: float = 0.
    drop: str = ''
    times: Optional[int] = None
    headers: Dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    oid: str
    files: Dict[str, bytes]
    message: str


@dataclass
class Repo:
    private: bool
    commits: List[Commit] = field(default_factory=list)

    def add_commit(self, files: Dict[str, bytes], message: str) -> Commit:
        text = json.dumps([len(self.commits), message, sorted(map(_blob_id, files.values()))])
        self.commits.append(Commit(hashlib.sha1(text.encode()).hexdigest(), files, message))
        return self.commits[-1]


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith('.safetensors')


def _describe(path: str, content: bytes) -> Dict[str, Any]:
    entry = dict(type='file', path=path, size=len(content), oid=_blob_id(content))
    if _is_large(path):
        entry['lfs'] = dict(oid=hashlib.sha256(content).hexdigest(), size=len(content), pointerSize=130)
    return entry


class LoopbackHub:
    """The Hub; use it as a context manager.

    Args:
        user: Account of the one token it knows, and the only namespace that may be written to.
        token: That token.

    Attributes:
        repos: Repositories by name.
        requests: Names of the endpoints that were asked, in order.
    """

    def __init__(self, user: str = 'tester', token: str = 'hf_test'):
        self.user, self.token = user, token
        self.reset()
        self.stopped = threading.Event()
        self.server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self) -> 'LoopbackHub':
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        """Forget repositories, stored files, requests and failures."""
        self.repos: Dict[str, Repo] = {}
        self.stored: Dict[str, bytes] = {}
        self.requests: List[str] = []
        self.failures: Dict[str, Failure] = {}

    def fail(self, endpoint: str, **failure: Any) -> None:
        """Have an endpoint fail, see `Failure`."""
        self.failures[endpoint] = Failure(**failure)

    def next_failure(self, endpoint: str) -> Failure:
        """The failure that the present request is to have, one of no effect if none."""
        failure = self.failures.get(endpoint)
        if failure is None or failure.times == 0:
            return Failure()
        if failure.times is not None:
            failure.times -= 1
        return failure

    def files(self, name: str) -> Dict[str, bytes]:
        """Files of a repository's newest commit, without what the Hub puts there itself."""
        repo = self.repos.get(name)
        files = repo.commits[-1].files if repo else {}
        return {path: content for path, content in files.items() if path != '.gitattributes'}

    def _find(self, request: '_Handler', name: str, revision: str = 'main') -> Commit:
        repo = self.repos.get(name)
        if repo is None or repo.private and not request.is_user:
            raise Refusal(404, 'Repository not found', 'RepoNotFound')
        for commit in reversed(repo.commits):
            if revision in ('main', commit.oid):
                return commit
        raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def _check_writable(self, request: '_Handler', name: str) -> None:
        if not request.is_user:
            raise Refusal(401, 'Invalid username or password.')
        if name.split('/')[0] != self.user:
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{name.split("/")[0]}"')

    def whoami(self, request: '_Handler') -> Dict[str, Any]:
        self._check_writable(request, self.user)
        return dict(type='user', name=self.user, orgs=[])

    def create(self, request: '_Handler') -> Dict[str, Any]:
        wanted = request.json()
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._check_writable(request, name)
        if name in self.repos:
            raise Refusal(409, 'You already created this model repo')
        private = wanted.get('private') or wanted.get('visibility') == 'private'
        self.repos[name] = Repo(bool(private))
        self.repos[name].add_commit({'.gitattributes': b'*.safetensors filter=lfs\n'}, 'initial commit')
        return dict(url=f'{self.endpoint}/{name}', name=name, id=name)

    def validate(self, request: '_Handler') -> Dict[str, Any]:
        try:
            metadata = yaml.safe_load(request.json()['content'].split('---\n')[1])
            assert metadata.get('license') in LICENSES, f'"license" must be one of {LICENSES}'
        except Exception as error:
            raise Refusal(400, f'Invalid metadata: {error}') from error
        return dict(errors=[], warnings=[])

    def preupload(self, request: '_Handler', name: str, revision: str) -> Dict[str, Any]:
        self._check_writable(request, name)
        files = self._find(request, name, revision).files
        return dict(files=[
            dict(
                path=file['path'],
                uploadMode='lfs' if _is_large(file['path']) else 'regular',
                shouldIgnore=False,
                oid=self._known_oid(files, file['path']),
            )
            for file in request.json()['files']
        ])

    @staticmethod
    def _known_oid(files: Dict[str, bytes], path: str) -> Optional[str]:
        if path not in files:
            return None
        entry = _describe(path, files[path])
        return entry.get('lfs', entry)['oid']

    def lfs_batch(self, request: '_Handler', name: str) -> Dict[str, Any]:
        self._check_writable(request, name)
        objects = request.json()['objects']
        for wanted in objects:
            if wanted['oid'] not in self.stored:
                wanted['actions'] = {
                    action: dict(href=f"{self.endpoint}/storage/{action}/{wanted['oid']}")
                    for action in ('upload', 'verify')
                }
        return dict(transfer='basic', objects=objects)

    def lfs_upload(self, request: '_Handler', oid: str) -> Dict[str, Any]:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, 'The content is not what its name says.')
        self.stored[oid] = request.body
        return {}

    def lfs_verify(self, request: '_Handler', oid: str) -> Dict[str, Any]:
        if len(self.stored.get(oid, b'')) != request.json()['size']:
            raise Refusal(404, 'The file has not arrived.')
        return {}

    def commit(self, request: '_Handler', name: str, revision: str) -> Dict[str, Any]:
        self._check_writable(request, name)
        parent = self._find(request, name, revision)
        files, header = dict(parent.files), {}
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                header = value
            elif item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile' and value['oid'] in self.stored:
                files[value['path']] = self.stored[value['oid']]
            else:
                raise Refusal(400, f"Cannot commit {item['key']} {value['path']}")
        if header.get('parentCommit', parent.oid) != parent.oid:
            raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
        commit = self.repos[name].add_commit(files, header['summary'])
        return dict(success=True, commitOid=commit.oid, commitUrl=f'{self.endpoint}/{name}/commit/{commit.oid}')

    def info(self, request: '_Handler', name: str, revision: str = 'main') -> Dict[str, Any]:
        commit = self._find(request, name, revision or 'main')
        siblings = []
        for path, content in commit.files.items():
            siblings.append(dict(rfilename=path))
            if 'blobs=' in request.path:
                entry = _describe(path, content)
                siblings[-1].update(blobId=entry['oid'], size=entry['size'])
                if 'lfs' in entry:
                    siblings[-1]['lfs'] = dict(entry['lfs'], sha256=entry['lfs']['oid'])
        return dict(id=name, sha=commit.oid, private=self.repos[name].private, siblings=siblings, tags=[])

    def tree(self, request: '_Handler', name: str, revision: str) -> List[Dict[str, Any]]:
        return [_describe(*file) for file in self._find(request, name, revision).files.items()]

    def resolve(self, request: '_Handler', name: str, revision: str, path: str) -> bytes:
        commit = self._find(request, name, revision)
        request.answer_headers['X-Repo-Commit'] = commit.oid
        if path not in commit.files:
            raise Refusal(404, 'Entry not found', 'EntryNotFound')
        entry = _describe(path, commit.files[path])
        request.answer_headers['ETag'] = f'"{entry["oid"]}"'
        if 'lfs' in entry:
            request.answer_headers.update({
                'X-Linked-Etag': f'"{entry["lfs"]["oid"]}"', 'X-Linked-Size': str(entry['size'])})
        return commit.files[path]


NAME = r'([^/]+/[^/]+)'
ROUTES = [
    ('GET', '/api/whoami-v2', 'whoami'),
    ('POST', '/api/repos/create', 'create'),
    ('POST', '/api/validate-yaml', 'validate'),
    ('POST', f'/api/models/{NAME}/preupload/([^/]+)', 'preupload'),
    ('POST', f'/{NAME}.git/info/lfs/objects/batch', 'lfs_batch'),
    ('PUT', '/storage/upload/([^/]+)', 'lfs_upload'),
    ('POST', '/storage/verify/([^/]+)', 'lfs_verify'),
    ('POST', f'/api/models/{NAME}/commit/([^/]+)', 'commit'),
    ('GET', f'/api/models/{NAME}(?:/revision/([^/]+))?', 'info'),
    ('GET', f'/api/models/{NAME}/tree/([^/]+)', 'tree'),
    ('GET|HEAD', f'/{NAME}/resolve/([^/]+)/(.+)', 'resolve'),
]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        pass  # clients that have hung up


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = 'HTTP/1.1'
    wbufsize = -1  # an answer goes out at once, or it waits for the client's acknowledgement of its headers

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def is_user(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {self.hub.token}'

    def json(self) -> Any:
        return json.loads(self.body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: bytes, headers: Dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {'Content-Type': 'application/json', **headers}.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def _serve(self) -> None:
        path = self.path.split('?')[0]
        matches = ((re.fullmatch(pattern, path), method, name) for method, pattern, name in ROUTES)
        match, _, name = next((m for m in matches if m[0] and self.command in m[1].split('|')), (None, '', 'unknown'))
        self.hub.requests.append(name)
        failure = self.hub.next_failure(name)
        self.hub.stopped.wait(failure.delay)
        length = int(self.headers.get('Content-Length') or 0)
        if failure.drop == 'before':
            self.rfile.read(length // 2)
            return self._hang_up()
        self.body = self.rfile.read(length)
        self.answer_headers: Dict[str, str] = {}
        try:
            if failure.status:
                raise Refusal(failure.status, failure.message)
            if match is None:
                raise Refusal(404, 'Not found')
            result = getattr(self.hub, name)(self, *match.groups(default='main'))
            status, content = 200, result if isinstance(result, bytes) else json.dumps(result).encode()
        except Refusal as refusal:
            status, content = refusal.status, json.dumps(dict(error=str(refusal))).encode()
            self.answer_headers.update(refusal.headers, **failure.headers)
        if failure.drop == 'after':
            return self._hang_up()
        self._answer(status, content, self.answer_headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

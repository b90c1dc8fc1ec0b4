"""A Hugging Face Hub on 127.0.0.1: what publishing and loading a model ask of it, and refusals on demand."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, TOKEN = 'tester', 'hf_test'  # the one account, and its token
NAME = r'([^/]+/[^/]+)'
ROUTES = {
    'create': '/api/repos/create',
    'validate': '/api/validate-yaml',
    'preupload': f'/api/models/{NAME}/preupload/main',
    'lfs_batch': f'/{NAME}.git/info/lfs/objects/batch',
    'lfs_upload': '/storage/(.+)',
    'commit': f'/api/models/{NAME}/commit/main',
    'info': f'/api/models/{NAME}',
    'resolve': f'/{NAME}/resolve/main/(.+)',
}


class Refusal(Exception):
    """An answer that is an error: status, message and, by which huggingface_hub tells what is missing, code."""


class LoopbackHub(ThreadingHTTPServer):
    """The Hub.

    Attributes:
        repos: `private` and `commits`, each the files by name, of every repository.
        refusals: Status and message with which to answer a route.
        requests: Routes asked, in order.
    """

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.repos, self.stored, self.refusals, self.requests = {}, {}, {}, []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def files(self, name):
        """A repository's files by name, without what the Hub puts there itself."""
        files = self.repos[name]['commits'][-1] if name in self.repos else {}
        return {path: content for path, content in files.items() if path != '.gitattributes'}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1  # an answer goes out at once, or it waits for the client's acknowledgement of its headers

    def log_message(self, *_):
        pass

    def _serve(self):
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        matches = {route: re.fullmatch(pattern, self.path.split('?')[0]) for route, pattern in ROUTES.items()}
        route = next((route for route, match in matches.items() if match), 'unknown')
        self.server.requests.append(route)
        try:
            if route in self.server.refusals:
                raise Refusal(*self.server.refusals[route])
            if route == 'unknown':  # the client also asks for what it can do without
                raise Refusal(404, 'Not found')
            if route not in ('validate', 'lfs_upload') and self.headers.get('Authorization') != f'Bearer {TOKEN}':
                raise Refusal(401, 'Invalid username or password.')
            answer, headers, status = getattr(self, route)(*matches[route].groups()), {}, 200
        except Refusal as refusal:
            status, message, *code = refusal.args
            answer = {'error': message, 'url': f'{self.server.endpoint}/{USER}/taken'}
            headers = {'X-Error-Message': message, 'X-Error-Code': (code or [''])[0]}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        headers.update({'Content-Length': len(content), 'X-Repo-Commit': '0' * 40})
        headers['ETag'] = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _repo(self, name):
        if name not in self.server.repos:
            raise Refusal(404, 'Repository not found', 'RepoNotFound')
        return self.server.repos[name]

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted['organization'] != USER:
            raise Refusal(403, f"You don't have the rights to create a model under {wanted['organization']}")
        if name in self.server.repos:
            raise Refusal(409, 'You already created this model repo')
        private = wanted.get('visibility') == 'private' or wanted.get('private', False)
        self.server.repos[name] = {'private': private, 'commits': [{'.gitattributes': b''}]}
        return {'url': f'{self.server.endpoint}/{name}'}

    def validate(self):
        if 'license: Free' in json.loads(self.body)['content']:
            raise Refusal(400, '"license" must be one of mit, apache-2.0 and so on')
        return {'errors': [], 'warnings': []}

    def preupload(self, name):
        self._repo(name)
        paths = [file['path'] for file in json.loads(self.body)['files']]
        modes = ['lfs' if path.endswith('.safetensors') else 'regular' for path in paths]
        return {'files': [
            {'path': path, 'uploadMode': mode, 'shouldIgnore': False} for path, mode in zip(paths, modes)]}

    def lfs_batch(self, name):
        objects = json.loads(self.body)['objects']
        for wanted in objects:
            wanted['actions'] = {'upload': {'href': f"{self.server.endpoint}/storage/{wanted['oid']}"}}
        return {'transfer': 'basic', 'objects': objects}

    def lfs_upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.stored[oid] = self.body
        return {}

    def commit(self, name):
        commits = self._repo(name)['commits']
        files = dict(commits[-1])
        for item in map(json.loads, self.body.splitlines()):
            value = item['value']
            if item['key'] == 'header' and value['parentCommit'] != f'{len(commits):040}':
                raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
            if item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            if item['key'] == 'lfsFile':
                files[value['path']] = self.server.stored[value['oid']]
        commits.append(files)
        return {'commitOid': f'{len(commits):040}', 'commitUrl': f'{self.server.endpoint}/{name}'}

    def info(self, name):
        repo = self._repo(name)
        files = [{'rfilename': path} for path in repo['commits'][-1]]
        return {'id': name, 'sha': f"{len(repo['commits']):040}", 'private': repo['private'], 'siblings': files}

    def resolve(self, name, path):
        files = self._repo(name)['commits'][-1]
        if path not in files:
            raise Refusal(404, 'Entry not found', 'EntryNotFound')
        return files[path]

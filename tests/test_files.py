"""Files of results: whole or not at all, and nothing that is no regular file is replaced."""
import errno
import os
import stat
import threading

import pytest

from shike_timm.files import spreadsheet_cell, write_text, write_whole


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'results.json'
    write_text(path, 'old')
    with pytest.raises(RuntimeError), write_whole(path) as file:
        file.write('half')
        raise RuntimeError
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['results.json']
    with write_whole(path, 'wb') as file:
        file.write(b'new')
    assert path.read_text() == 'new'


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    link, target = tmp_path / 'link', tmp_path / 'folder' / 'target'
    for there in (False, True):
        if not there:
            link.symlink_to(target)  # which does not exist yet
        write_text(link, f'text {there}')
        assert link.is_symlink() and target.read_text() == f'text {there}'


def test_devices_and_pipes_are_written_to(tmp_path, capsys):
    for path in ('/dev/null', '/dev/full'):
        before = os.stat(path)
        if path == '/dev/full':
            with pytest.raises(OSError) as raised:
                write_text(path, 'text')
            assert raised.value.errno == errno.ENOSPC and '/dev/full' in str(raised.value)
        else:
            write_text(path, 'text')
        assert stat.S_ISCHR(os.stat(path).st_mode) and os.stat(path).st_ino == before.st_ino
    pipe, read = tmp_path / 'pipe', []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, 'through the pipe')
    reader.join()
    assert read == ['through the pipe'] and stat.S_ISFIFO(os.stat(pipe).st_mode)
    write_text('-', 'to the terminal')
    assert capsys.readouterr().out == 'to the terminal'


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError) as raised, write_whole(tmp_path / 'results.json') as file:
        file.write('half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert 'results.json' in str(raised.value) and not list(tmp_path.iterdir())


def test_cells_of_spreadsheets():
    for text in ('=1+1', '+1', '-1', '@SUM(A1)', '\t=1', '\r=1'):
        assert spreadsheet_cell(text) == spreadsheet_cell(spreadsheet_cell(text)) == f"'{text}"
    for value in ('a=1', '', "'=1", -1.5, None):
        assert spreadsheet_cell(value) == value

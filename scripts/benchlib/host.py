# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine: messages, processes that never outlive this one, files, devices, and what the machine is."""

import ctypes
import errno
import fcntl
import glob
import json
import mmap
import os
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import timeit
from datetime import datetime, timezone

from .rows import MIB

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
CLONE_NEWNS = 0x20000
MS_REC_PRIVATE = 0x44000
MNT_DETACH = 2
LOOP_CTL_GET_FREE = 0x4C82
LOOP_CLR_FD = 0x4C01
LOOP_CONFIGURE = 0x4C0A
LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO = 4, 16
ABSOLUTE_PATH = re.compile(r'(?<![\w.:])/(?:[^/\s\'",:;()]+/)+')

started = time.monotonic()
_on_status = False


class Failed(Exception):
    """The message is all that the user needs."""


def elapsed():
    return time.monotonic() - started


def say(text):
    clear_status()
    print(f'[bench] {elapsed():4.0f}s  {text}', flush=True)


def status(text):
    """A line that the next one replaces; only a terminal has such lines."""
    global _on_status
    if sys.stdout.isatty():
        line = f'[bench] {elapsed():4.0f}s  {text}'
        print('\r' + line[:shutil.get_terminal_size().columns - 1] + '\033[K', end='', flush=True)
        _on_status = True


def clear_status():
    global _on_status
    if _on_status:
        print('\r\033[K', end='')
        _on_status = False


def without_paths(text):
    """Reports tell nothing of where on this machine things are."""
    return ABSOLUTE_PATH.sub('', text)


# --- processes ---

def _before_exec(parent=os.getpid()):
    # A run must not outlive this program, however it ends; and one that crashes leaves no core file.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Ended:
    """How a process ended."""

    def __init__(self, code, out='', err='', hung=False):
        self.code, self.out, self.err, self.hung = code, out, err, hung

    @property
    def signal(self):
        return -self.code if not self.hung and self.code < 0 else 0

    def last_words(self):
        """What a program says last is usually why it ended."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        if not lines:
            return 'no message'
        return re.sub(r'^(raw-aio-bench|bench-guest): ', '', without_paths(lines[-1]))[:300]


class Children:
    """Processes, each in a session of its own: Ctrl-C at the terminal is for this program, which ends them itself."""

    def __init__(self):
        self.alive = set()

    def start(self, argv, env=None, **more):
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=env, start_new_session=True,
                                 preexec_fn=_before_exec, **more)
        self.alive.add(child)
        return child

    def stop(self, child):
        """The whole group: fio's jobs and a guest's QEMU are children of what was started."""
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            # One in the middle of a write to a bad disk can't be waited for.
            child.wait(30)
        except subprocess.TimeoutExpired:
            pass
        self.alive.discard(child)

    def run(self, argv, limit, env=None):
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = self.start(argv, env, stdout=out, stderr=err)
            hung = False
            try:
                child.wait(limit)
            except subprocess.TimeoutExpired:
                hung = True
            finally:
                self.stop(child)
            out.seek(0)
            err.seek(0)
            texts = [f.read().decode(errors='replace') for f in (out, err)]
            return Ended(child.returncode, *texts, hung)

    def stop_all(self):
        for child in list(self.alive):
            self.stop(child)


def _tree(pid):
    found = []
    for path in glob.glob(f'/proc/{pid}/task/*/children'):
        try:
            with open(path, encoding='ascii') as f:
                below = f.read().split()
        except OSError:
            continue
        for child in below:
            found += [int(child), *_tree(child)]
    return found


def run_script(argv, **more):
    """A script of this repository, with its progress and sudo's question on the terminal. Returns its exit status.

    It stays in the session and the group of this program for that, and is ended process by process.
    """
    clear_status()
    with subprocess.Popen(argv, **more) as child:
        try:
            return child.wait()
        except BaseException:
            for pid in [child.pid, *_tree(child.pid)]:
                for number in (signal.SIGTERM, signal.SIGCONT):
                    try:
                        os.kill(pid, number)
                    except OSError:
                        pass
            raise


# --- files ---

def new_folder(parent, prefix):
    """A folder of our own, locked as long as this process lives, for its successors to tell it from a stale one."""
    remove_stale(parent, prefix)
    try:
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        lock = os.open(os.path.join(path, 'lock'), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise Failed(f'could not write to {parent}: {e.strerror}') from None
    fcntl.flock(lock, fcntl.LOCK_EX)
    return path


def remove_stale(parent, prefix):
    """What runs that were killed have left. One that lives holds its lock."""
    for path in glob.glob(os.path.join(glob.escape(parent), prefix + '*')):
        try:
            lock = os.open(os.path.join(path, 'lock'), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(os.path.join(path, 'zram'), encoding='ascii') as f:
                Zram.remove(f.read())
        except BlockingIOError:
            continue
        except OSError:
            pass
        finally:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def check_writable(path):
    """Whether the report can be written, known before hours of work."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, 'ab'):
                return
        parent = os.path.dirname(os.path.abspath(path))
        with tempfile.NamedTemporaryFile(dir=parent, prefix='.bench.'):
            pass
    except OSError as e:
        raise Failed(f'could not write {path}: {e.strerror}') from None


def write_file(path, text):
    """All or nothing, so that an interrupted one leaves the last good file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, 'w', encoding='utf-8') as f:
                f.write(text)
            return
        path = os.path.realpath(path)
        temporary = f'{path}.{os.getpid()}.tmp'
        try:
            with open(temporary, 'w', encoding='utf-8') as f:
                f.write(text)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    except OSError as e:
        raise Failed(f'could not write {path}: {e.strerror}') from None


def has_direct(directory):
    """Whether a file there can be read with O_DIRECT: some file systems take the flag and refuse the read."""
    path = os.path.join(directory, 'probe')
    with open(path, 'wb') as f:
        f.write(b'\0' * 65536)
        os.fsync(f.fileno())
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 65536) as buffer:
                return os.preadv(fd, [buffer], 0) == 65536
        finally:
            os.close(fd)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise Failed(f'could not read in {directory}: {e.strerror}') from None
    finally:
        os.unlink(path)


def free_space(directory):
    fs = os.statvfs(directory)
    # Some have no size at all.
    return sys.maxsize if fs.f_blocks == 0 else fs.f_bavail * fs.f_frsize


def settle(path):
    """What a run has left to write would be written during the next one."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def warm(path):
    with open(path, 'rb', buffering=0) as f:
        buffer = bytearray(4 * MIB)
        while f.readinto(buffer):
            pass


def drop(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def new_sparse(path, size):
    if os.path.exists(path):
        os.unlink(path)
    with open(path, 'wb') as f:
        f.truncate(size)


# --- memory and block devices ---

def is_root():
    return os.geteuid() == 0


def mount_tmpfs(path, size):
    """A tmpfs that only this process and its children see, hence gone with them; False if impossible."""
    if not is_root() or not hasattr(LIBC, 'unshare') or LIBC.unshare(CLONE_NEWNS):
        return False
    if LIBC.mount(b'none', b'/', None, ctypes.c_ulong(MS_REC_PRIVATE), None):
        return False
    return LIBC.mount(b'tmpfs', os.fsencode(path), b'tmpfs', ctypes.c_ulong(0), f'size={size},mode=0700'.encode()) == 0


def unmount(path):
    LIBC.umount2(os.fsencode(path), MNT_DETACH)


class Zram:
    """A compressed disk in memory; what has been written to it may take as much memory."""
    kind = 'zram'

    def __init__(self, size, folder):
        try:
            subprocess.run(['modprobe', 'zram'], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        except OSError:
            pass
        with open('/sys/class/zram-control/hot_add', encoding='ascii') as f:
            self.number = f.read().strip()
        try:
            # For a successor, should this process be killed.
            with open(os.path.join(folder, 'zram'), 'w', encoding='ascii') as f:
                f.write(self.number)
            with open(f'/sys/block/zram{self.number}/disksize', 'w', encoding='ascii') as f:
                f.write(str(size))
            self.path = f'/dev/zram{self.number}'
            if not stat.S_ISBLK(os.stat(self.path).st_mode):
                raise OSError(errno.ENODEV, f'no {self.path}')
        except BaseException:
            self.close()
            raise

    @staticmethod
    def remove(number):
        for path, value in ((f'/sys/block/zram{int(number)}/reset', '1'),
                            ('/sys/class/zram-control/hot_remove', str(int(number)))):
            with open(path, 'w', encoding='ascii') as f:
                f.write(value)

    def close(self):
        # A process that was killed a moment ago may still hold it.
        for _ in range(50):
            try:
                return self.remove(self.number)
            except OSError as e:
                if e.errno != errno.EBUSY:
                    return None
                time.sleep(0.1)
        return None


class Loop:
    """A file as a block device that bypasses the page cache. The kernel takes it apart when this process is gone."""
    kind = 'loop, direct-io'

    def __init__(self, path, size):
        new_sparse(path, size)
        with open(path, 'r+b') as backing:
            os.posix_fallocate(backing.fileno(), 0, size)
            control = os.open('/dev/loop-control', os.O_RDWR | os.O_CLOEXEC)
            try:
                for _ in range(10):
                    number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
                    self.path = f'/dev/loop{number}'
                    self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                    try:
                        # struct loop_config: fd, block size, struct loop_info64 (its flags at byte 52 of it), reserved
                        info = bytearray(232)
                        struct.pack_into('I', info, 52, LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO)
                        config = struct.pack('II', backing.fileno(), 0) + bytes(info) + bytes(64)
                        fcntl.ioctl(self.fd, LOOP_CONFIGURE, config)
                        return
                    except OSError as e:
                        os.close(self.fd)
                        # Someone else was faster.
                        if e.errno != errno.EBUSY:
                            raise
            finally:
                os.close(control)
        raise OSError(errno.EBUSY, 'no free loop device')

    def close(self):
        try:
            fcntl.ioctl(self.fd, LOOP_CLR_FD)
        except OSError:
            pass
        os.close(self.fd)


def check_device(path):
    """Refuses a device that someone uses: what is on it is about to be destroyed."""
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise Failed(f'{path} is not a block device')
        # The kernel refuses this for what is mounted, swapped to, or part of something, also for a part of the disk.
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise Failed(f'{path} is in use (mounted, swap, or part of another device): its contents would be '
                         'destroyed; name one that is not') from None
        raise Failed(f'could not open {path}: {e.strerror}') from None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


# --- what the machine is ---

def _read(path):
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return f.read().strip()
    except OSError:
        return ''


def available_memory():
    found = re.search(r'^MemAvailable:\s+(\d+) kB', _read('/proc/meminfo'), re.M)
    return int(found[1]) << 10 if found else 0


def load_average():
    return [round(value, 2) for value in os.getloadavg()]


def _file_system(directory):
    """Type and options of the mount; options that name places or hosts are left out."""
    best = ('', '', '')
    path = os.path.realpath(directory)
    for line in _read('/proc/self/mountinfo').splitlines():
        left, _, right = line.partition(' - ')
        point = left.split()[4].encode().decode('unicode_escape')
        if (path == point or path.startswith(point.rstrip('/') + '/')) and len(point) >= len(best[0]):
            options = left.split()[5] + ',' + right.split()[-1]
            best = (point, right.split()[0], options)
    kept = dict.fromkeys(o for o in best[2].split(',') if '/' not in o and 'addr=' not in o and 'host' not in o)
    return best[1] or None, ','.join(kept) or None


def _device(directory):
    number = os.stat(directory).st_dev
    path = os.path.realpath(f'/sys/dev/block/{os.major(number)}:{os.minor(number)}')
    if not os.path.isdir(path):
        return None
    if not os.path.isdir(path + '/queue'):      # a partition
        path = os.path.dirname(path)
    name = os.path.basename(path)
    kind = {'vd': 'virtio disk', 'nv': 'NVMe', 'sd': 'SCSI or SATA disk', 'dm': 'device mapper', 'md': 'software RAID',
            'lo': 'loop device', 'xv': 'Xen disk', 'mm': 'memory card', 'zr': 'zram'}.get(name[:2], 'disk')
    # What a hypervisor's disk says of this is rarely true.
    rotational = {'0': 'not rotational', '1': 'rotational'}.get(_read(path + '/queue/rotational')) \
        if name[:2] in ('sd', 'nv') else None
    scheduler = re.search(r'\[(.*?)\]', _read(path + '/queue/scheduler'))
    model = _read(path + '/device/model')
    details = [model, rotational, scheduler and f'scheduler {scheduler[1]}']
    return f'{kind} ({", ".join(d for d in details if d)})'


def _first_line(argv):
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=20, check=False, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _system_call_us():
    # The least of several, as others may use the CPU; getppid() does next to nothing, and Python adds some 0.05 us.
    calls = 10000
    return round(min(timeit.repeat(os.getppid, number=calls, repeat=20)) / calls * 1e6, 2)


def describe(directory, repository, fio, qemu_imgs):
    cpuinfo = _read('/proc/cpuinfo')
    model = re.search(r'^model name\s*:\s*(.*)', cpuinfo, re.M)
    memory = re.search(r'^MemTotal:\s+(\d+) kB', _read('/proc/meminfo'), re.M)
    fs, options = _file_system(directory)
    git = ['git', '-C', repository, '-c', f'safe.directory={repository}']
    return {
        'date': datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%SZ'),
        'kernel': os.uname().release,
        'architecture': os.uname().machine,
        'cpus': len(os.sched_getaffinity(0)),
        'cpu_model': model[1] if model else None,
        'virtual': bool(re.search(r'^flags\s*:.*\bhypervisor\b', cpuinfo, re.M)),
        'system_call_us': _system_call_us(),
        'memory_mib': int(memory[1]) >> 10 if memory else None,
        'file_system': fs,
        'mount_options': options,
        'device': _device(directory),
        'fio': _first_line([fio, '--version']) if fio else None,
        'qemu': {side: _first_line([path, '--version']) for side, path in qemu_imgs.items()},
        'commit': _first_line([*git, 'rev-parse', 'HEAD']),
        'commit_modified': bool(_first_line([*git, 'status', '--porcelain'])),
        'load_before': load_average(),
    }


def to_json(document):
    return json.dumps(document, indent=1) + '\n'

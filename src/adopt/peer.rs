//! The process at the other end of a socket, as the kernel names it, and its descriptors.
#![expect(unsafe_code, reason = "asks the kernel for the peer of a socket")]

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::AdoptError;

/// `SO_PEERPIDFD` of Linux 6.5, which `libc` has for some processors only.
const SO_PEERPIDFD: libc::c_int = 77;
/// The most bytes read of a file in /proc.
const MAX_TEXT: u64 = 1 << 16;
/// The most open files of a process that are looked at. Linux's default for the largest number is 1048576.
const MAX_LISTED: usize = 1 << 17;

/// A process. It stays the same one, whatever becomes of its number.
pub(super) struct PeerProcess {
    pidfd: OwnedFd,
    pid: i32,
    /// `/proc/PID`, opened when the process was known to exist: it never leads to another one.
    folder: OwnedFd,
}

/// What a process runs, and as whom.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// Device and inode of the program.
    program: (u32, u32, u64),
    /// The line with its user IDs.
    users: String,
}

impl PeerProcess {
    /// The process that has connected `socket`, or has made its pair. `whose` names the socket in an error.
    pub(super) fn of(socket: BorrowedFd<'_>, whose: &'static str) -> Result<Self, AdoptError> {
        let no_peer = |source| AdoptError::NoPeer {
            socket: whose,
            source,
        };
        let pidfd = peer_pidfd(socket).map_err(no_peer)?;
        let pid = number_of(pidfd.as_fd()).map_err(no_peer)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty());
        let process = Self {
            folder: folder.map_err(|_| AdoptError::Ended)?,
            pidfd,
            pid,
        };
        // The number cannot have been given to another process before this one has ended.
        process.check_alive()?;
        Ok(process)
    }

    /// Refuses a process that has ended.
    pub(super) fn check_alive(&self) -> Result<(), AdoptError> {
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut ended, Some(&now)) {
            Ok(0) => Ok(()),
            Ok(_) => Err(AdoptError::Ended),
            Err(cause) => Err(system("look at the process", cause.into())),
        }
    }

    /// What it runs now.
    pub(super) fn image(&self) -> Result<Image, AdoptError> {
        let mask = StatxFlags::INO | StatxFlags::TYPE;
        let found = rustix::fs::statx(&self.folder, "exe", AtFlags::STATX_DONT_SYNC, mask);
        let found = found.map_err(|cause| self.failed(cause.into()))?;
        let status = self.text(c"status").map_err(|cause| self.failed(cause))?;
        let users = status.lines().find(|line| line.starts_with("Uid:"));
        self.check_alive()?;
        Ok(Image {
            program: (found.stx_dev_major, found.stx_dev_minor, found.stx_ino),
            users: users.unwrap_or_default().to_owned(),
        })
    }

    /// Refuses a process that runs something else than `image`.
    pub(super) fn check_image(&self, image: &Image) -> Result<(), AdoptError> {
        if self.image()? != *image {
            return Err(AdoptError::Changed);
        }
        Ok(())
    }

    /// Its control group in the unified hierarchy.
    pub(super) fn control_group(&self) -> Result<String, AdoptError> {
        let text = self.text(c"cgroup").map_err(|cause| self.failed(cause))?;
        self.check_alive()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::"));
        Ok(path.unwrap_or_default().to_owned())
    }

    /// The numbers of its descriptors that are open for reading and writing, in ascending order.
    ///
    /// From `fdinfo`: the folder `fd` has its owner's rights only, which `CAP_SYS_PTRACE` does not pass over.
    pub(super) fn descriptors(&self) -> Result<Vec<RawFd>, AdoptError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |cause: Errno| self.failed(cause.into());
        let folder = rustix::fs::openat(&self.folder, "fdinfo", flags, Mode::empty());
        let entries = Dir::new(folder.map_err(failed)?).map_err(failed)?;
        let mut found = Vec::new();
        for (count, entry) in entries.enumerate() {
            if count >= MAX_LISTED {
                return Err(AdoptError::TooMany(MAX_LISTED));
            }
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_str().unwrap_or_default();
            let Ok(number) = name.parse::<RawFd>() else {
                continue;
            };
            let path = format!("fdinfo/{number}\0");
            let path = CStr::from_bytes_with_nul(path.as_bytes()).unwrap_or(c"");
            // It may have been closed since.
            if self.text(path).is_ok_and(|text| may_be_device(&text)) {
                found.push(number);
            }
        }
        found.sort_unstable();
        self.check_alive()?;
        Ok(found)
    }

    /// A duplicate of one of its descriptors; `None` if it is not open any more.
    pub(super) fn duplicate(&self, number: RawFd) -> Result<Option<OwnedFd>, AdoptError> {
        match pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty()) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::BADF) => Ok(None),
            Err(Errno::SRCH) => Err(AdoptError::Ended),
            Err(cause) => Err(self.failed(cause.into())),
        }
    }

    fn failed(&self, cause: io::Error) -> AdoptError {
        match cause.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => AdoptError::Denied {
                pid: self.pid,
                source: cause,
            },
            Some(libc::ESRCH | libc::ENOENT) => AdoptError::Ended,
            _ => system("look at the process", cause),
        }
    }

    fn text(&self, below: &CStr) -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.folder, below, flags, Mode::empty())?;
        read_text(file)
    }
}

fn system(step: &'static str, source: io::Error) -> AdoptError {
    AdoptError::System { step, source }
}

fn read_text(file: OwnedFd) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::from(file).take(MAX_TEXT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether a descriptor with this `fdinfo` may be that of a device: it is open for reading and writing, and is none of the
/// kinds of which a VMM has thousands.
fn may_be_device(text: &str) -> bool {
    const OTHERS: [&str; 5] = ["eventfd-count", "tfd", "scm_fds", "clockid", "Pid"];
    let mut flags = None;
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        if OTHERS.contains(&key) {
            return false;
        }
        if key == "flags" {
            flags = libc::c_int::from_str_radix(value.trim(), 8).ok();
        }
    }
    // A descriptor that was opened with O_PATH is not open on the device.
    flags.is_some_and(|flags| flags & (libc::O_ACCMODE | libc::O_PATH) == libc::O_RDWR)
}

/// A descriptor of the process at the other end of a Unix socket.
fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut number: libc::c_int = -1;
    let mut len = libc::socklen_t::try_from(size_of_val(&number)).map_err(io::Error::other)?;
    // SAFETY:
    // - number: valid for writes of `len` bytes, which is its size
    // - the descriptor is open, as it is borrowed
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut number).cast(),
            &raw mut len,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    if number < 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    // SAFETY: the kernel has made the descriptor for this call just now.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The number of the process of a pidfd in this process's namespace.
fn number_of(pidfd: BorrowedFd<'_>) -> io::Result<i32> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let text = read_text(rustix::fs::open(path, flags, Mode::empty())?)?;
    let number = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    let number = number.and_then(|number| number.trim().parse().ok());
    // -1: it has ended. 0: it is in a namespace of which this process sees nothing.
    number
        .filter(|number| *number > 0)
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_are_open_for_both_may_be_devices() {
        for (text, may) in [
            ("pos:\t0\nflags:\t0100002\nmnt_id:\t15\nino:\t9\n", true),
            (
                "flags:\t02000002\nvfio-device-syspath: /sys/devices/x\n",
                true,
            ),
            ("flags:\t0100000\n", false),
            ("flags:\t0100001\n", false),
            // O_PATH.
            ("flags:\t010000002\n", false),
            ("flags:\t02\neventfd-count:                0\n", false),
            ("flags:\tx\n", false),
            ("", false),
        ] {
            assert_eq!(may_be_device(text), may, "{text}");
        }
    }
}

//! A thread of a daemon that a test stops, since no message of a VMM is known to make the worker hang.

#![expect(unsafe_code, reason = "traces another process")]

use std::{fs, thread};

/// A thread of another process that is stopped. Only the thread that made this may let it continue.
pub struct StoppedThread(libc::pid_t);

impl StoppedThread {
    /// Stops the thread `name` of a process.
    pub fn new(process: u32, name: &str) -> Self {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
        let mut ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
        let tid = ids.find(|id| {
            let comm = fs::read_to_string(format!("/proc/{process}/task/{id}/comm"));
            comm.is_ok_and(|comm| comm.trim() == name)
        });
        let tid: libc::pid_t = tid.unwrap_or_else(|| panic!("no thread {name}"));
        let none = std::ptr::null_mut::<libc::c_void>();
        for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
            // SAFETY: no pointer is passed.
            let done = unsafe { libc::ptrace(request, tid, none, none) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        }
        assert_eq!(wait(tid), tid, "{}", std::io::Error::last_os_error());
        Self(tid)
    }

    /// Lets the thread continue.
    pub fn resume(self) {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: no pointer is passed.
        let done = unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Takes note of the thread's death. Until then the process would stay a zombie for its parent.
    pub fn reap_when_killed(self) {
        thread::spawn(move || wait(self.0));
    }
}

/// Waits until the thread stops or ends.
fn wait(tid: libc::pid_t) -> libc::pid_t {
    let mut status = 0;
    // SAFETY: `status` is valid for the write.
    unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) }
}

//! The system calls that each role may make.
//!
//! If there is an older call with the same effect, it is in the list, too: C libraries and their versions differ
//! in the call they use.
//!
//! The file is long because it is one list, which a reviewer should see as a whole.

use libc::c_long;

use super::role::{Needs, Plugging, Role};

/// The number of a system call, and the condition under which it is allowed.
pub(super) type Call = (c_long, Condition);

/// The condition under which a call is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// With any arguments.
    Always,
    /// If one argument has a certain value.
    With(Argument),
    /// If two arguments have certain values.
    Both(Argument, Argument),
}

/// A condition on an argument, on its lower 32 bits unless said otherwise. Arguments are counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Argument {
    /// This value.
    Is(u8, u64),
    /// A value with all of these bits.
    HasAll(u8, u64),
    /// A value with none of these bits.
    HasNone(u8, u64),
    /// A value that has this part in the bits of the mask: the index, the mask, the part.
    HasPart(u8, u64, u64),
    /// A null pointer, in all 64 bits.
    IsNull(u8),
}

/// The calls that a thread of this role may make.
pub(super) fn calls(role: Role, needs: &Needs) -> Vec<Call> {
    let mut list = everywhere();
    match role {
        Role::Main => {
            list.extend(calls(Role::VhostUser, needs));
            list.extend(calls(Role::Worker, needs));
            list.extend(calls(Role::Relay, needs));
            list.extend(always(WAIT));
            list.extend(always(ACCEPT));
            list.extend(always(&SPAWN));
            list.extend(threads_only());
            list.extend(descriptors());
            list.extend(always(REMOVE_SOCKETS));
        }
        Role::VhostUser => {
            list.extend(always(&MESSAGES));
            list.extend(always(MEMORY_FILES));
            list.extend(always(&[libc::SYS_epoll_ctl]));
            list.extend(always(&PEER_EVENTS));
            list.extend(confine());
            list.extend(descriptors());
            list.extend(backends(needs));
        }
        Role::Relay => {
            if needs.relay {
                list.extend(always(EVENT_LOOP));
                list.extend(always(&MESSAGES));
                list.extend(always(&RECORD));
                // The bytes that are in the pipe.
                list.extend(ioctls(&[BYTES_IN_A_PIPE]));
                list.extend(descriptors());
            }
        }
        Role::Worker => {
            list.extend(always(WAIT));
            // Shuts the connection down when it ends.
            list.extend(always(&[libc::SYS_shutdown]));
            list.extend(always(&PEER_EVENTS));
            list.extend(confine());
            list.extend(backends(needs));
            if needs.realtime {
                list.extend(always(&[libc::SYS_sched_setscheduler]));
            }
        }
        Role::Control => {
            list.extend(always(WAIT));
            list.extend(always(ACCEPT));
            list.extend(always(&MESSAGES));
            list.extend(descriptors());
            list.extend(always(&[libc::SYS_geteuid]));
            if needs.kept_clients {
                list.extend(always(&CHANGES));
            }
            if let Some(plugged) = &needs.plugging {
                list.extend(plugging(needs, plugged));
            }
        }
        Role::Shadow => {
            list.extend(always(WAIT));
            list.extend(always(ACCEPT));
            list.extend(always(&MESSAGES));
            list.extend(always(&READERS));
            list.extend(always(&SHARED_WORDS));
            list.extend(always(&[libc::SYS_epoll_ctl, libc::SYS_geteuid]));
            list.extend(descriptors());
            list.push(fcntl(libc::F_ADD_SEALS));
        }
        Role::Qmp => {
            list.extend(always(WAIT));
            list.extend(always(&MESSAGES));
            list.extend(descriptors());
            list.extend(backends(needs));
        }
        Role::VfioUser => {
            list.extend(always(EVENT_LOOP));
            list.extend(always(ACCEPT));
            list.extend(always(&MESSAGES));
            list.extend(always(&PEER_EVENTS));
            list.extend(descriptors());
            list.extend(kept_messages(needs));
        }
        Role::Export => {
            list.extend(always(EVENT_LOOP));
            list.extend(always(ACCEPT));
            list.extend(always(&MESSAGES));
            list.extend(always(&DEVICE_REGISTERS));
            list.extend(always(&PEER_EVENTS));
            list.extend(descriptors());
            list.extend(ioctls(&needs.device_ioctls));
            if needs.kept_clients {
                list.extend(always(&RECORD));
            }
        }
        Role::VirtioPci => {
            list.extend(always(EVENT_LOOP));
            list.extend(always(ACCEPT));
            list.extend(always(&MESSAGES));
            list.extend(always(MEMORY_FILES));
            list.extend(always(&FIRMWARE));
            list.extend(always(&PEER_EVENTS));
            list.extend(descriptors());
            list.extend(backends(needs));
            if needs.kept_clients {
                list.extend(always(&RECORD));
            }
        }
        Role::PciWorker => {
            list.extend(always(EVENT_LOOP));
            list.extend(always(&PEER_EVENTS));
            list.extend(backends(needs));
            if needs.realtime {
                list.extend(always(&[libc::SYS_sched_setscheduler]));
            }
        }
        Role::Resets => {
            list.extend(always(&REOPEN));
            list.extend(ioctls(&needs.reset_ioctls));
        }
        Role::Signals => {
            list.extend(always(WAIT));
            list.extend(always(&MESSAGES));
            list.extend(always(REMOVE_SOCKETS));
            // Before it leaves the VM to the next process (`process::peer_event`).
            list.extend(always(&[libc::SYS_io_destroy]));
        }
        Role::Connector => {
            list.extend(always(&CONNECT));
            list.push(stream_sockets());
            list.extend(always(LOOK_AT_A_SOCKET));
            if needs.relay {
                list.extend(private_listener());
            }
        }
        Role::MetricsFile => {
            list.extend(always(TEXTFILE));
            list.extend(always(REMOVE_SOCKETS));
        }
        Role::VmmDevices => {
            list.extend(always(WAIT));
            list.extend(always(&MESSAGES));
            list.extend(always(MEMORY_FILES));
            // Recognizing copies of the iommufd.
            list.extend(always(&[libc::SYS_kcmp]));
            list.extend(descriptors());
            list.extend(backends(needs));
        }
        Role::ShadowFaults | Role::Faults => list.extend(always(&PEER_EVENTS)),
        Role::Watchdog | Role::Closer => {}
    }
    list
}

/// Locks, memory, time, the log, events, and the end of a thread.
const EVERYWHERE: [c_long; 27] = [
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_rseq,
    libc::SYS_write,
    libc::SYS_writev,
];

/// A list of calls that every processor has, and of those that only some have: later ones have no second call with the
/// effect of another.
macro_rules! list {
    ($(#[$doc:meta])* $name:ident = [$($call:ident),*] $(, $arch:literal [$($own:ident),*])*) => {
        $(#[$doc])*
        const $name: &[c_long] = &[
            $(libc::$call,)*
            $($(#[cfg(target_arch = $arch)] libc::$own,)*)*
        ];
    };
}

list! {
    /// Writing a line of the log without waiting (`logging::sink`).
    LOG = [SYS_pwritev2, SYS_ppoll], "x86_64" [SYS_poll]
}

list! {
    /// An event loop whose descriptors come and go (`process::event_loop`). Its set is made before the thread is confined.
    EVENT_LOOP = [SYS_epoll_ctl, SYS_epoll_pwait], "x86_64" [SYS_epoll_wait]
}

list! {
    /// Waiting for descriptors.
    WAIT = [SYS_epoll_pwait, SYS_ppoll], "x86_64" [SYS_epoll_wait, SYS_poll]
}

list! {
    /// Accepting a connection.
    ACCEPT = [SYS_accept, SYS_accept4]
}

/// Sending and receiving messages, options of a socket, and shutting it down.
const MESSAGES: [c_long; 7] = [
    libc::SYS_getsockopt,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// `FIONREAD`: the bytes that are in a pipe.
const BYTES_IN_A_PIPE: u32 = 0x541b;

/// `TIOCOUTQ`: the bytes that a socket's peer has not read.
const BYTES_UNREAD: u32 = 0x5411;

/// Writing the record of a client's connection, moving replies from a pipe into its socket, and recognizing copies of a
/// descriptor (`process::keeper`).
const RECORD: [c_long; 3] = [libc::SYS_pwrite64, libc::SYS_splice, libc::SYS_kcmp];

/// Writing the record of the endpoints that were added and removed.
const CHANGES: [c_long; 1] = [libc::SYS_pwrite64];

/// Making the memory and the pipe that outlive this process with the connections of a device (`process::record`,
/// `process::reply_pipe`).
const KEPT_MEMORY: [c_long; 3] = [libc::SYS_memfd_create, libc::SYS_ftruncate, libc::SYS_pipe2];

/// Connecting a socket that `stream_sockets` allows.
const CONNECT: [c_long; 1] = [libc::SYS_connect];

list! {
    /// Recognizing a symbolic link.
    LOOK_AT_A_SOCKET = [SYS_newfstatat, SYS_statx], "x86_64" [SYS_lstat]
}

list! {
    /// Type and size of a file of guest memory, and its name for an error message.
    MEMORY_FILES = [SYS_fstat, SYS_fstatfs, SYS_lseek, SYS_newfstatat, SYS_readlinkat, SYS_statx], "x86_64" [SYS_readlink]
}

/// Reading the root pointer of the guest's firmware, where the VMM has mapped it read-only.
const FIRMWARE: [c_long; 1] = [libc::SYS_pread64];

/// Growing and shrinking the page-table arena.
const ARENA: [c_long; 2] = [libc::SYS_fallocate, libc::SYS_ftruncate];

/// Identifying, waiting for and killing the process of a shadow reader.
const READERS: [c_long; 2] = [libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal];

/// Creating the epoch words of a shadow reader.
const SHARED_WORDS: [c_long; 2] = [libc::SYS_memfd_create, libc::SYS_ftruncate];

/// Registers and interrupts of an exported device.
const DEVICE_REGISTERS: [c_long; 3] = [libc::SYS_pread64, libc::SYS_pwrite64, libc::SYS_eventfd2];

/// Closing a device and opening it again under the number of its descriptor, and finding out whether another process has
/// it open (`vfio::BusReset`).
const REOPEN: [c_long; 4] = [
    libc::SYS_dup3,
    libc::SYS_eventfd2,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
];

/// Recognizing and signalling eventfds of other processes (`process::peer_event`).
const PEER_EVENTS: [c_long; 2] = [libc::SYS_io_submit, libc::SYS_io_getevents];

list! {
    /// Opening devices, reading sysfs, and creating listening sockets.
    OPEN = [
        SYS_bind, SYS_capget, SYS_capset, SYS_getdents64, SYS_kcmp, SYS_landlock_restrict_self, SYS_listen, SYS_openat,
        SYS_readlinkat
    ], "x86_64" [SYS_open, SYS_readlink]
}

list! {
    /// Giving a socket its mode and its group.
    SOCKET_RIGHTS = [SYS_fchmod, SYS_fchmodat, SYS_fchownat], "x86_64" [SYS_chmod, SYS_lchown]
}

list! {
    /// Writing a file and renaming it over another one. Landlock limits the folder.
    TEXTFILE = [SYS_fchmod, SYS_openat, SYS_renameat2], "x86_64" [SYS_open, SYS_rename], "aarch64" [SYS_renameat]
}

/// Starting the threads of a connection and creating its events. `clone` is in `threads_only`.
const SPAWN: [c_long; 5] = [
    // Allowed here, because the thread's other filter answers `clone3` with ENOSYS (`filter::programs`).
    libc::SYS_clone3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_set_tid_address,
];

list! {
    /// Removing the file of a socket if it is still the same.
    REMOVE_SOCKETS = [SYS_newfstatat, SYS_statx, SYS_unlinkat], "x86_64" [SYS_lstat, SYS_stat, SYS_unlink]
}

fn everywhere() -> Vec<Call> {
    let bits = |flags: libc::c_int| u64::from(flags.unsigned_abs());
    let exec = bits(libc::PROT_EXEC);
    let own = u64::from(std::process::id());
    let with = |call, argument| (call, Condition::With(argument));
    always(&EVERYWHERE)
        .chain(always(LOG))
        .chain([
            // No executable memory.
            with(libc::SYS_mmap, Argument::HasNone(2, exec)),
            with(libc::SYS_mprotect, Argument::HasNone(2, exec)),
            // Names of threads and of memory.
            with(libc::SYS_prctl, Argument::Is(0, bits(libc::PR_SET_NAME))),
            with(libc::SYS_prctl, Argument::Is(0, bits(libc::PR_SET_VMA))),
            // The signal handler, which runs on any thread, wakes the thread `signals` with it. Without an address: a
            // datagram socket, such as that of the service manager, would reach any other one.
            with(libc::SYS_sendto, Argument::IsNull(4)),
            // Debug builds check that a descriptor is open before they close it.
            with(libc::SYS_fcntl, Argument::Is(1, bits(libc::F_GETFD))),
            // If a fault is no stack overflow, Rust's handler resets the signal's action, so that the fault ends the
            // process.
            with(libc::SYS_rt_sigaction, Argument::Is(0, bits(libc::SIGBUS))),
            with(libc::SYS_rt_sigaction, Argument::Is(0, bits(libc::SIGSEGV))),
            // `abort` sends SIGABRT to the thread that calls it.
            with(libc::SYS_tgkill, Argument::Is(0, own)),
        ])
        .collect()
}

/// Opening a device, creating a socket at a path, and starting a thread for it; and all calls of those threads,
/// because they inherit the filter of the thread that starts them. Landlock limits the paths.
fn plugging(needs: &Needs, plugging: &Plugging) -> Vec<Call> {
    let mut list: Vec<Call> = ioctls(&plugging.ioctls).collect();
    for child in [Role::VfioUser, Role::Export, Role::Resets, Role::Faults] {
        list.extend(calls(child, needs));
    }
    list.extend(always(OPEN));
    list.push(stream_sockets());
    // A new thread drops capabilities that this one has kept.
    let ambient = Argument::Is(0, u64::from(libc::PR_CAP_AMBIENT.unsigned_abs()));
    list.push((libc::SYS_prctl, Condition::With(ambient)));
    list.extend(always(&SPAWN));
    list.extend(always(REMOVE_SOCKETS));
    if needs.socket_rights {
        list.extend(always(SOCKET_RIGHTS));
    }
    list.extend(always(MEMORY_FILES));
    list.extend(threads_only());
    list.extend(confine());
    list.extend(backends(needs));
    if needs.kept_clients {
        list.extend(always(&KEPT_MEMORY));
        list.push(fcntl(libc::F_ADD_SEALS));
        list.push(fcntl(libc::F_GETPIPE_SZ));
    }
    list
}

/// The calls of backends, in every thread that maps, unmaps or attaches.
fn backends(needs: &Needs) -> Vec<Call> {
    let mut list: Vec<Call> = always(&ARENA).collect();
    if !needs.iommu_ioctls.is_empty() {
        list.extend(ioctls(&needs.iommu_ioctls));
        // Reads the BARs of the devices, and clears their bus-master bits.
        list.extend(always(&[libc::SYS_pread64, libc::SYS_pwrite64]));
    }
    list.extend(kept_messages(needs));
    if needs.emulated || needs.shadow {
        list.extend(always(WAIT));
        list.extend(always(&MESSAGES));
    }
    if needs.shadow {
        list.extend(always(&READERS));
    }
    list
}

/// Sending messages to the peers of emulated devices from memory that outlives the daemon: a file position is where the
/// next daemon goes on.
fn kept_messages(needs: &Needs) -> Vec<Call> {
    let mut list = Vec::new();
    if needs.kept_clients && needs.emulated {
        list.extend(always(&[libc::SYS_sendfile, libc::SYS_lseek]));
        list.extend(ioctls(&[BYTES_UNREAD]));
    }
    list
}

/// Duplicating descriptors, and their flags.
fn descriptors() -> Vec<Call> {
    let commands = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_GET_SEALS,
    ];
    let mut list: Vec<Call> = commands.iter().map(|command| fcntl(*command)).collect();
    list.push(ioctl(FIONBIO));
    list
}

fn fcntl(command: libc::c_int) -> Call {
    let command = Argument::Is(1, u64::from(command.unsigned_abs()));
    (libc::SYS_fcntl, Condition::With(command))
}

/// `FIONBIO` of `asm-generic/ioctls.h`, which makes a socket blocking or nonblocking.
const FIONBIO: u32 = 0x5421;

fn ioctls(numbers: &[u32]) -> impl Iterator<Item = Call> {
    numbers.iter().map(|number| ioctl(*number))
}

fn ioctl(number: u32) -> Call {
    let number = Argument::Is(1, number.into());
    (libc::SYS_ioctl, Condition::With(number))
}

/// Creating a Unix stream socket. No datagram socket: it reaches every other one without `connect`.
fn stream_sockets() -> Call {
    let bits = |flags: libc::c_int| u64::from(flags.unsigned_abs());
    let local = Argument::Is(0, bits(libc::AF_UNIX));
    // The other bits are SOCK_CLOEXEC and SOCK_NONBLOCK.
    let stream = Argument::HasPart(1, 0xf, bits(libc::SOCK_STREAM));
    (libc::SYS_socket, Condition::Both(local, stream))
}

/// A listener with an abstract address that the kernel chooses: `bind` with an address of two bytes, the family alone. Its
/// queue takes one connection.
fn private_listener() -> [Call; 3] {
    [
        (libc::SYS_bind, Condition::With(Argument::Is(2, 2))),
        (libc::SYS_listen, Condition::With(Argument::Is(1, 0))),
        (libc::SYS_getsockname, Condition::Always),
    ]
}

/// A thread that a library has started adds its own filter to the one of the main thread.
fn confine() -> [Call; 2] {
    let privileges = u64::from(libc::PR_SET_NO_NEW_PRIVS.unsigned_abs());
    [
        (libc::SYS_seccomp, Condition::Always),
        (
            libc::SYS_prctl,
            Condition::With(Argument::Is(0, privileges)),
        ),
    ]
}

/// Starting threads, but not processes.
fn threads_only() -> [Call; 1] {
    let flags = libc::CLONE_THREAD | libc::CLONE_VM;
    let thread = Argument::HasAll(0, u64::from(flags.unsigned_abs()));
    [(libc::SYS_clone, Condition::With(thread))]
}

fn always(numbers: &[c_long]) -> impl Iterator<Item = Call> {
    numbers.iter().map(|number| (*number, Condition::Always))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No thread opens a file, starts a program or process, listens at an address that it chooses, or reads the memory of
    /// another process.
    #[test]
    fn no_role_may_make_a_dangerous_call() {
        let needs = Needs::all_without_files();
        let never = [
            libc::SYS_openat,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_mount,
            libc::SYS_setuid,
            libc::SYS_setns,
            libc::SYS_unshare,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_chmod,
            libc::SYS_mkdirat,
            libc::SYS_renameat2,
            libc::SYS_keyctl,
            libc::SYS_userfaultfd,
        ];
        // That thread writes a file.
        for role in Role::ALL
            .into_iter()
            .filter(|role| *role != Role::MetricsFile)
        {
            let allowed = calls(role, &needs);
            for call in allowed
                .iter()
                .filter(|call| !private_listener().contains(call))
            {
                assert!(!never.contains(&call.0), "{role:?} may call {}", call.0);
            }
            // Roles may make these calls only under a condition.
            for narrow in [
                libc::SYS_ioctl,
                libc::SYS_socket,
                libc::SYS_clone,
                libc::SYS_mmap,
                libc::SYS_mprotect,
                libc::SYS_fcntl,
                libc::SYS_prctl,
                libc::SYS_rt_sigaction,
                libc::SYS_tgkill,
            ] {
                assert!(!allowed.contains(&(narrow, Condition::Always)), "{role:?}");
            }
        }
    }

    /// Only the thread that adds endpoints opens files, and that of the metrics file.
    #[test]
    fn files_are_opened_to_add_endpoints_and_for_metrics() {
        let plugging = Needs {
            plugging: Some(Plugging::default()),
            textfile_folder: Some("/run/metrics".into()),
            ..Needs::default()
        };
        let plain = Needs {
            plugging: None,
            ..plugging.clone()
        };
        for (role, needs) in Role::ALL
            .iter()
            .flat_map(|role| [(*role, &plugging), (*role, &plain)])
        {
            let allowed = calls(role, needs);
            let opens = allowed.contains(&(libc::SYS_openat, Condition::Always));
            let may =
                role == Role::MetricsFile || role == Role::Control && needs.plugging.is_some();
            assert_eq!(opens, may, "{role:?}");
            assert!(
                !allowed
                    .iter()
                    .any(|(number, _)| *number == libc::SYS_execve)
            );
        }
    }

    /// A thread that reads what a peer sends cannot connect to a socket of the peer's choice.
    #[test]
    fn only_the_connector_connects() {
        let needs = Needs {
            plugging: Some(Plugging::default()),
            textfile_folder: Some("/run/metrics".into()),
            ..Needs::all_without_files()
        };
        for role in Role::ALL {
            let allowed = calls(role, &needs);
            let has = |wanted| allowed.iter().any(|(number, _)| *number == wanted);
            assert_eq!(has(libc::SYS_connect), role == Role::Connector, "{role:?}");
            // These two listen.
            let makes_sockets = [Role::Connector, Role::Control].contains(&role);
            assert_eq!(has(libc::SYS_listen), makes_sockets, "{role:?}");
            assert_eq!(has(libc::SYS_socket), makes_sockets, "{role:?}");
            assert!(!allowed.contains(&(libc::SYS_sendto, Condition::Always)));
            assert!(!has(libc::SYS_socketpair), "{role:?}");
        }
    }

    /// A thread that can detach a device can also stop it. vfio-pci has no ioctl for that: a thread without the call would
    /// end the daemon when a device does not wake up.
    #[test]
    fn threads_that_attach_devices_can_clear_the_bus_master_bit() {
        let needs = Needs {
            iommu_ioctls: vec![1],
            ..Needs::default()
        };
        for role in Role::ALL {
            let allowed = calls(role, &needs);
            if allowed.contains(&ioctl(1)) {
                let writes_at = (libc::SYS_pwrite64, Condition::Always);
                assert!(allowed.contains(&writes_at), "{role:?}");
            }
        }
    }

    /// Without a need in the configuration, threads reach neither other processes nor the host's IOMMU.
    #[test]
    fn calls_without_a_need_are_not_allowed() {
        let plain = Needs::default();
        for role in [Role::Main, Role::VhostUser, Role::Worker] {
            let allowed = calls(role, &plain);
            let has = |wanted| allowed.iter().any(|(number, _)| *number == wanted);
            assert!(!has(libc::SYS_pidfd_send_signal), "{role:?}");
        }
        for role in Role::ALL {
            let allowed = calls(role, &plain);
            let reads_at = allowed.iter().any(|call| call.0 == libc::SYS_pread64);
            // The firmware's root pointer; registers of a device.
            let registers = [Role::Export, Role::Resets].contains(&role);
            assert_eq!(reads_at, registers || role == Role::VirtioPci, "{role:?}");
            let writes_at = allowed.iter().any(|call| call.0 == libc::SYS_pwrite64);
            assert_eq!(writes_at, registers, "{role:?}");
        }
        let worker = calls(Role::Worker, &plain);
        assert!(!worker.iter().any(|(number, _)| *number == libc::SYS_ioctl));
        assert!(
            !worker
                .iter()
                .any(|(number, _)| *number == libc::SYS_sendmsg)
        );
    }
}

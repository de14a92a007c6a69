//! Confinement of the daemon's threads as the kernel reports it.

use std::fs;

use crate::bed::{Bed, IOVA, LENGTH, THREADS, status_of, threads};
use crate::common::daemon::Daemon;
use crate::connection::{DMA_READ, dma};

/// CAP_DAC_OVERRIDE, to connect to servers of other users and to write into their folders.
const DAC_OVERRIDE: u64 = 1 << 1;
/// CAP_KILL, to kill readers of other users.
const KILL: u64 = 1 << 5;

/// The capabilities that a thread may keep. A thread that parses messages and has `DAC_OVERRIDE` could reach the sockets
/// and files of every user.
fn kept(thread: &str, is_main: bool) -> u64 {
    match thread {
        "connector" | "metrics-file" => DAC_OVERRIDE,
        "vhost-user" | "relay" | "vring_worker" | "shadow" => KILL,
        _ if is_main => KILL,
        _ => 0,
    }
}

fn permitted_to_this_test() -> u64 {
    let own = std::process::id();
    hex(&status_of(own, own, "CapPrm").expect("a kernel with capabilities"))
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).expect("a mask")
}

#[test]
fn every_thread_is_confined() {
    let bed = Bed::new(&[]);
    let pid = bed.daemon.pid();
    let found = threads(pid);
    let names: Vec<_> = found.iter().map(|(_, name)| name.as_str()).collect();
    for name in THREADS {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    assert_eq!(found.len(), THREADS.len() + 1, "{names:?}");
    let own = permitted_to_this_test();
    for (tid, name) in &found {
        let status = |key| status_of(pid, *tid, key);
        assert_eq!(status("Seccomp").as_deref(), Some("2"), "{name}");
        assert_eq!(status("NoNewPrivs").as_deref(), Some("1"), "{name}");
        for set in ["CapEff", "CapPrm"] {
            let kept = own & kept(name, *tid == pid);
            assert_eq!(hex(&status(set).unwrap()), kept, "{set} of {name}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(hex(&status(set).unwrap()), 0, "{set} of {name}");
        }
        // The thread's own filter, and the two of the main thread if that has started it.
        let filters = match name.as_str() {
            _ if *tid == pid => "2",
            "vhost-user" | "relay" | "vring_worker" => "3",
            _ => "1",
        };
        if let Some(count) = status("Seccomp_filters") {
            assert_eq!(count, filters, "{name}");
        }
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("its limits");
    let core = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .expect("a limit");
    assert_eq!(
        core.split_whitespace().collect::<Vec<_>>(),
        ["0", "0", "bytes"]
    );
    bed.daemon.wait_for("a message about it", || {
        bed.daemon.log().contains("sandboxed: ")
    });
}

/// A C library may read files when a thread frees much memory; the sandbox forbids it.
#[test]
fn the_allocator_needs_no_files() {
    let mut bed = Bed::new(&[]);
    for _ in 0..10 {
        // More than the daemon sends at once, so that answers pile up in memory that it then frees.
        let asked: Vec<_> = (0..16)
            .map(|_| bed.device.ask(DMA_READ, &dma(IOVA, LENGTH / 2, &[]), &[]))
            .collect();
        for id in asked {
            let reply = bed.device.recv().expect("a reply");
            assert_eq!((reply.id, reply.errno()), (id, 0));
            assert_eq!(reply.body.len() as u64, 16 + LENGTH / 2);
        }
    }
    bed.daemon.terminate();
    let status = bed.daemon.wait_for_end();
    assert!(status.success(), "{status}");
}

/// The two threads of the virtio-pci transport have a filter each, and no capability.
#[test]
fn threads_of_virtio_pci_are_confined() {
    let daemon = Daemon::over_vfio_user("address = '00:05.0'\n");
    daemon.wait_for("the sandbox", || daemon.log().contains("sandboxed: "));
    let found = threads(daemon.pid());
    for wanted in ["virtio-pci", "pci-worker"] {
        let (tid, _) = found
            .iter()
            .find(|(_, name)| name == wanted)
            .unwrap_or_else(|| panic!("{wanted} is not in {found:?}"));
        let status = |key| status_of(daemon.pid(), *tid, key);
        assert_eq!(status("Seccomp").as_deref(), Some("2"), "{wanted}");
        assert_eq!(status("NoNewPrivs").as_deref(), Some("1"), "{wanted}");
        assert_eq!(hex(&status("CapEff").expect("a mask")), 0, "{wanted}");
    }
    assert!(!found.iter().any(|(_, name)| name == "vring_worker"));
}

#[test]
fn only_needed_capabilities_are_kept() {
    let daemon = Daemon::start();
    daemon.wait_for("the sandbox", || daemon.log().contains("sandboxed: "));
    for (tid, name) in threads(daemon.pid()) {
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            let value = status_of(daemon.pid(), tid, set).expect("a mask");
            assert_eq!(hex(&value), 0, "{set} of {name}");
        }
    }
}

#[test]
fn without_the_sandbox_the_log_warns() {
    let bed = Bed::new(&["--no-sandbox"]);
    let pid = bed.daemon.pid();
    for (tid, name) in threads(pid) {
        assert_eq!(
            status_of(pid, tid, "Seccomp").as_deref(),
            Some("0"),
            "{name}"
        );
    }
    bed.daemon.wait_for("a warning", || {
        bed.daemon.log().contains("without the sandbox")
    });
}

//! Any bytes of a VMM at its QMP socket.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vhost_device_iommu::qemu::pci_tree::PciTree;
use vhost_device_iommu::qemu::qmp::{Asker, Qmp, VmReports};

const GREETING: &[u8] = b"{\"QMP\": {}}\n";
const RESET: &[u8] = b"\"RESET\"";

struct Counter(Arc<AtomicUsize>);

impl VmReports for Counter {
    fn reset(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn places(&self, _: Result<PciTree, String>) {}
}

fuzz_target!(|input: (bool, &[u8])| {
    let (greets, bytes) = input;
    static LISTENER: OnceLock<UnixListener> = OnceLock::new();
    let path = std::env::temp_dir().join(format!("viommu-fuzz-qmp-{}", std::process::id()));
    let listener = LISTENER.get_or_init(|| UnixListener::bind(&path).expect("a socket"));
    let resets = Arc::new(AtomicUsize::new(0));
    let counted = resets.clone();
    let asker = Asker::new().expect("an event");
    asker.ask_when_connected();
    let qmp = Qmp::start(path, &asker, Counter(counted));
    let qmp = qmp.expect("a thread");
    qmp.set_vmm_present(true);
    let (mut stream, _) = listener.accept().expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("set");
    if greets {
        let _ = stream.write_all(GREETING);
    }
    // The daemon closes the connection at the first wrong line.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(cause) = stream.read_to_end(&mut answer) {
        let kind = cause.kind();
        assert_eq!(
            kind,
            std::io::ErrorKind::ConnectionReset,
            "the daemon hangs"
        );
    }
    assert!(answer.len() < 128, "the daemon sends two commands");
    drop(qmp);
    let named = bytes.windows(RESET.len()).filter(|w| *w == RESET).count();
    // An event may be written with escapes: the bound is one in ten bytes.
    let most = named.max(bytes.len() / 10);
    assert!(resets.load(Ordering::Relaxed) <= most);
});

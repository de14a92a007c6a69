//! Faults of an emulated device reach the event queue: the test is the device's server and its client, too.

use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;

use crate::bed::{CONFIG, POISON, SPACE, Vm};
use crate::common::daemon::{Daemon, EP};
use crate::common::wire::{self, OK};
use crate::connection::{Connection, DMA_READ, DMA_WRITE, RESET, VERSION, dma, version_body};

/// The server of the device at 00:06.0 and the VMM's client of the device.
struct Emulated {
    server: Connection,
    _client: Connection,
    _folder: TempDir,
}

impl Emulated {
    /// A daemon with the emulated device, whose guest has not attached it.
    fn new() -> (Daemon, Self) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let listener = UnixListener::bind(path("server")).expect("a socket");
        let keys = format!(
            "vfio-user = {{ listen = {:?}, connect = {:?}, isolation = 'messages' }}\n",
            path("client"),
            path("server"),
        );
        let device = "address = '00:06.0'\n";
        let config = CONFIG.replace(device, &format!("{device}{keys}"));
        let daemon = Daemon::over_vfio_user(&format!("bypass = false\n{config}"));
        let stream = UnixStream::connect(path("client")).expect("connected");
        let mut client = Connection::new(stream);
        let hello = version_body("{}");
        client.ask(VERSION, &hello, &[]);
        let (stream, _) = listener.accept().expect("the daemon");
        let mut server = Connection::new(stream);
        let request = server.recv().expect("VERSION");
        server.reply(&request, &hello, &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        let device = Self {
            server,
            _client: client,
            _folder: folder,
        };
        (daemon, device)
    }

    /// The device reads or writes where the guest has mapped nothing. Waits until the daemon has counted the fault.
    fn fault(&mut self, daemon: &Daemon, command: u16, address: u64) {
        let counts = || {
            let faults = &daemon.status()["faults"];
            let count = |key: &str| faults[key].as_u64().expect("a number");
            count("delivered") + count("dropped")
        };
        let before = counts();
        let data: &[u8] = if command == DMA_WRITE { b"data" } else { &[] };
        let refused = self.server.call(command, &dma(address, 4, data), &[]);
        assert_eq!(refused.errno(), libc::EFAULT);
        daemon.wait_for("the fault", || counts() > before);
    }
}

fn delivered(daemon: &Daemon) -> u64 {
    let delivered = &daemon.status()["faults"]["delivered"];
    delivered.as_u64().expect("a number")
}

#[test]
fn faults_reach_the_event_queue_with_an_interrupt_each() {
    let (daemon, mut device) = Emulated::new();
    let mut vm = Vm::started(&daemon);
    assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
    // The request's own interrupt follows its answer.
    daemon.wait_for("an interrupt", || vm.take_interrupts()[1] == 1);
    device.fault(&daemon, DMA_READ, 0x5000);
    assert_eq!(delivered(&daemon), 0, "there is no buffer");
    assert_eq!(vm.take_interrupts(), [0; 3]);
    // Access and validity of the address: READ or WRITE, ADDRESS.
    for (command, flags, address) in [(DMA_READ, 0x101u32, 0x7000u64), (DMA_WRITE, 0x102, 0x9000)] {
        vm.post_event_buffer();
        assert_eq!(vm.event_buffer(), [POISON; 24], "not before the fault");
        device.fault(&daemon, command, address);
        assert_eq!(vm.events.take_used(&vm.memory), Some((0, 24)));
        let record = vm.event_buffer();
        // Reason MAPPING.
        assert_eq!(record[..4], [2, 0, 0, 0]);
        assert_eq!(record[4..8], flags.to_le_bytes());
        assert_eq!(record[8..12], EP.to_le_bytes());
        assert_eq!(record[16..], address.to_le_bytes());
        daemon.wait_for("an interrupt", || vm.take_interrupts() == [0, 0, 1]);
    }
    assert_eq!(delivered(&daemon), 2);
}

/// A fault finds the event queue stopped: the device leaves its buffer alone, and sends no interrupt.
#[test]
fn no_fault_reaches_a_queue_that_is_stopped() {
    type Stop = fn(&mut Vm);
    let (daemon, mut device) = Emulated::new();
    let mut vm = Vm::new(&daemon);
    let stops: [Stop; 3] = [
        Vm::reset,
        |vm| assert_eq!(vm.client.connection.call(RESET, &[], &[]).errno(), 0),
        // Not a bus master.
        |vm| vm.client.write(SPACE, 4, &[2, 0]),
    ];
    for (round, stop) in stops.into_iter().enumerate() {
        vm.start(64);
        assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
        vm.post_event_buffer();
        stop(&mut vm);
        vm.take_interrupts();
        let before = vm.memory.regions[0].read_all();
        device.fault(&daemon, DMA_READ, 0x5000);
        assert_eq!(delivered(&daemon), round as u64, "{round}");
        let after = vm.memory.regions[0].read_all();
        assert!(before == after, "{round}: the device writes");
        // The next driver gets faults again.
        vm.start(64);
        assert_eq!(vm.call(&daemon, &wire::attach(1, EP, 0)), OK);
        assert_eq!(vm.take_interrupts()[2], 0, "{round}");
        vm.post_event_buffer();
        device.fault(&daemon, DMA_READ, 0x6000);
        assert_eq!(vm.event_buffer()[16..], 0x6000u64.to_le_bytes(), "{round}");
        daemon.wait_for("an interrupt", || vm.take_interrupts()[2] == 1);
    }
}

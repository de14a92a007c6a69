//! Garbage on every socket of a daemon with all kinds of endpoints. Each time the daemon closes that connection and
//! logs the reason, and the other endpoints work as before.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_device_iommu::ids::EndpointId;
use vhost_device_iommu::shadow::ShadowReader;
use vm_memory::{Bytes, GuestAddress};

use crate::bed::{CLIENT_TEXT, SERVER_TEXT, accept, answer};
use crate::common::daemon::{Daemon, EP, EP2, EP3};
use crate::common::guest::{Guest, Setup};
use crate::connection::{
    COMMAND, Connection, DMA_READ, REGION_READ, VERSION, bytes, dma, region, version_body,
};
use crate::hostile::{garbage_of_clients, garbage_of_servers, send};

const IOVA: u64 = 0x7000_0000;
/// A guest-physical address in the first memory slot.
const PAGE: u64 = 0xa0_0000;
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon, a guest, a device with constant traffic, a shadow reader, and a device that gets the garbage.
struct SocketBed {
    daemon: Daemon,
    guest: Option<Guest>,
    traffic: Traffic,
    reader: ShadowReader,
    /// The socket of the bad device's server.
    listener: UnixListener,
    folder: TempDir,
    checks: u64,
}

impl SocketBed {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let daemon = Daemon::with_config(&format!(
            "address = '00:05.0'\nbypass = false\n\
             [[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = {{ listen = {:?}, connect = {:?} }}\n\
             [[endpoint]]\naddress = '00:07.0'\n\
             vfio-user = {{ listen = {:?}, connect = {:?} }}\n\
             [[endpoint]]\naddress = '00:08.0'\nshadow = {:?}\n",
            at("bad-client"),
            at("bad-server"),
            at("good-client"),
            at("good-server"),
            at("shadow")
        ));
        let listener = UnixListener::bind(at("bad-server")).expect("a socket");
        let good = UnixListener::bind(at("good-server")).expect("a socket");
        let mut guest = Guest::boot_with(&daemon, Setup::default());
        for endpoint in [EP, EP2, EP3] {
            assert_eq!(guest.attach(1, endpoint), 0);
        }
        assert_eq!(guest.map_page(1, IOVA, PAGE), 0);
        guest.memory.write(PAGE, b"good");
        let reader =
            ShadowReader::connect(&at("shadow"), EndpointId(EP3)).expect("the reader is accepted");
        let traffic = Traffic::start(&at("good-client"), good);
        Self {
            daemon,
            guest: Some(guest),
            traffic,
            reader,
            listener,
            folder,
            checks: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Checks that everything but the bad connection works.
    fn assert_works(&mut self, after: &str) {
        self.daemon.assert_alive();
        self.traffic.assert_continues(after);
        if let Some(guest) = &mut self.guest {
            self.checks += 1;
            let at = IOVA + (1 + self.checks % 64) * 0x1000;
            assert_eq!(guest.map_page(1, at, PAGE), 0, "after {after}");
            let found = self.reader.memory().read_obj(GuestAddress(at));
            assert_eq!(&found.unwrap_or([0; 4]), b"good", "after {after}");
            assert_eq!(guest.unmap(1, at, at + 0xfff), 0, "after {after}");
        }
    }

    fn assert_logged(&self, text: &str) {
        let log = || self.daemon.log();
        self.daemon.wait_for(text, || log().contains(text));
    }

    /// Disconnects the bad device's client, which waits for a new server, and drops the connections that the
    /// daemon has made meanwhile.
    fn disconnect(&self, client: &mut Connection) {
        client.stream.shutdown(Shutdown::Both).expect("open");
        let state = || self.daemon.status()["emulated"][0]["client"].clone();
        self.daemon
            .wait_for("the client's end", || state() == false);
        self.listener.set_nonblocking(true).expect("set");
        while self.listener.accept().is_ok() {}
        self.listener.set_nonblocking(false).expect("set");
    }

    /// A client and a server of the bad device that have negotiated.
    fn bad_pair(&self) -> (Connection, Connection) {
        let stream = UnixStream::connect(self.path("bad-client")).expect("connected");
        let mut client = Connection::new(stream);
        client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        let mut server = accept(&self.listener);
        let request = server.recv().expect("VERSION");
        server.reply(&request, &version_body(SERVER_TEXT), &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        let window = server.recv().expect("a window");
        server.reply(&window, &[], &[]);
        (client, server)
    }
}

/// A device with constant traffic: the client reads registers, and the server reads memory for each read.
struct Traffic {
    over: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    fn start(client: &std::path::Path, listener: UnixListener) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let server = std::thread::spawn(move || {
            let mut server = accept(&listener);
            while let Some(message) = server.recv() {
                if message.cmd == REGION_READ {
                    let id = server.ask(DMA_READ, &dma(IOVA, 4, &[]), &[]);
                    let reply = loop {
                        match server.recv().expect("a reply") {
                            reply if reply.id == id && reply.cmd == DMA_READ => break reply,
                            command => answer(&mut server, &command),
                        }
                    };
                    assert!(reply.errno() != 0 || reply.body[16..] == *b"good");
                }
                answer(&mut server, &message);
            }
        });
        let stream = UnixStream::connect(client).expect("connected");
        let (ends, counted) = (over.clone(), rounds.clone());
        let client = std::thread::spawn(move || {
            let mut client = Connection::new(stream);
            let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
            assert_eq!(answer.errno(), 0);
            while !ends.load(Ordering::Relaxed) {
                let reply = client.call(REGION_READ, &region(5, 0, 4, &[]), &[]);
                assert_eq!(reply.body[16..], [5; 4]);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self {
            over,
            rounds,
            threads: vec![client, server],
        }
    }

    fn assert_continues(&self, after: &str) {
        let before = self.rounds.load(Ordering::Relaxed);
        let until = Instant::now() + PATIENCE;
        while self.rounds.load(Ordering::Relaxed) <= before + 1 {
            assert!(
                Instant::now() < until,
                "the traffic stands still after {after}"
            );
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("no check failed");
        }
    }
}

#[test]
fn garbage_on_any_socket_closes_that_connection_and_nothing_else() {
    let mut bed = SocketBed::new();
    bed.assert_works("the start");
    let mut before = usize::MAX;
    for _ in 0..2 {
        garbage_from_clients(&mut bed);
        garbage_from_servers(&mut bed);
        garbage_from_readers(&mut bed);
        garbage_from_operators(&mut bed);
        let daemon = &bed.daemon;
        daemon.wait_for("descriptors as before", || daemon.fd_count() <= before);
        // By now the daemon must have closed the descriptors that came with the garbage.
        std::thread::sleep(Duration::from_millis(50));
        before = daemon.fd_count();
    }
    bed.guest = None;
    let daemon = &bed.daemon;
    daemon.wait_for("the guest's end", || daemon.status()["connected"] == false);
    garbage_from_vmms(&mut bed);
    let status = bed.daemon.status();
    assert_eq!(status["readers"]["killed"], 0, "{status}");
    bed.traffic.end();
}

fn garbage_from_clients(bed: &mut SocketBed) {
    for (what, bytes, descriptors) in garbage_of_clients() {
        let (mut client, mut server) = bed.bad_pair();
        send(&mut client, &bytes, descriptors);
        assert!(client.is_closed() && server.is_closed(), "{what}");
        bed.assert_works(what);
    }
    bed.assert_logged("endpoint 0000:00:06.0: the client is cut off: ");
    for whole in [0, 16] {
        let (mut client, mut server) = bed.bad_pair();
        let message = bytes(1, REGION_READ, COMMAND, 0, &region(0, 0, 4, &[]));
        client.send_raw(&message[..whole + 7], &[]);
        client.stream.shutdown(Shutdown::Write).expect("open");
        assert!(client.is_closed() && server.is_closed());
        bed.assert_works("half a message from a client");
    }
}

fn garbage_from_servers(bed: &mut SocketBed) {
    // First, before the limit of the log is reached.
    let (mut client, mut server) = bed.bad_pair();
    let message = bytes(1, DMA_READ, COMMAND, 0, &dma(IOVA, 4, &[]));
    server.send_raw(&message[..20], &[]);
    drop(server);
    // Before the client disconnects: its end closes the server's connection, and the interposer then reads no more
    // of it.
    bed.assert_logged("hung up within a message");
    bed.assert_works("half a message from a server");
    bed.disconnect(&mut client);
    for (what, bytes, descriptors) in garbage_of_servers() {
        let (mut client, mut server) = bed.bad_pair();
        send(&mut server, &bytes, descriptors);
        assert!(server.is_closed(), "{what}");
        bed.assert_works(what);
        bed.disconnect(&mut client);
    }
    bed.assert_logged("endpoint 0000:00:06.0: the server is cut off: ");
}

fn garbage_from_readers(bed: &mut SocketBed) {
    let mut hello = vec![1u8, 0, 0, 0, 9, 0, 0, 0];
    hello.extend(b"iommushd");
    hello.extend([0; 24]);
    let null = File::open("/dev/null").expect("open");
    for (what, bytes, descriptors) in [
        ("a frame of another version", &hello[..], 0),
        ("bytes that are no frame", &[0xff; 40][..], 0),
        ("far too many bytes", &[7; 100_000][..], 0),
        ("half a frame", &hello[..21], 0),
        ("a frame with descriptors", &hello[..], 3),
        ("descriptors and no frame", &hello[..1], 1),
    ] {
        let stream = UnixStream::connect(bed.path("shadow")).expect("connected");
        let mut reader = Connection::new(stream);
        reader.send_raw(bytes, &vec![null.as_fd(); descriptors]);
        // An error is ignored: the daemon may have closed the connection already.
        let _ = reader.stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        // An error is ignored: bytes that the daemon has not read reset the connection.
        let _ = reader.stream.read_to_end(&mut answer);
        assert!(answer.len() <= 40, "{what}: the answer is a refusal alone");
        bed.assert_works(what);
    }
    bed.assert_logged("a reader is refused: ");
    bed.assert_logged("a process that wants to be a reader sends descriptors");
    bed.assert_logged("a process that wants to be a reader hangs up within a frame");
}

fn garbage_from_operators(bed: &mut SocketBed) {
    let null = File::open("/dev/null").expect("open");
    for (what, request, descriptors) in [
        ("bytes that are no text", &b"\xff\xfe\n"[..], 0),
        ("a long line", &[b'a'; 100_000][..], 0),
        ("zeroes", &[0; 5000][..], 0),
        ("half a request", b"transl", 0),
        ("no bytes", b"", 0),
        ("a request with descriptors", b"nonsense\n", 3),
    ] {
        let stream = UnixStream::connect(bed.daemon.control_socket()).expect("connected");
        let mut client = Connection::new(stream);
        if !request.is_empty() {
            client.send_raw(request, &vec![null.as_fd(); descriptors]);
        }
        let _ = client.stream.shutdown(Shutdown::Write);
        let mut answer = [0; 1024];
        let read = client.stream.read(&mut answer).expect("an answer");
        let answer = String::from_utf8_lossy(&answer[..read]);
        assert!(answer.contains("the request is one of"), "{what}: {answer}");
        bed.assert_works(what);
    }
    bed.assert_logged("a control client is refused: the request is one of");
}

/// The guest has disconnected; the traffic of the devices continues.
fn garbage_from_vmms(bed: &mut SocketBed) {
    let message = |request: u32, size: u32, body: &[u8]| {
        let head: Vec<u8> = [request, 1, size]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        [head, body.to_vec()].concat()
    };
    let null = File::open("/dev/null").expect("open");
    for (what, bytes, descriptors) in [
        ("an unknown request", message(1000, 0, &[]), 0),
        ("an oversized request", message(2, u32::MAX, &[1; 64]), 0),
        ("half a request", message(8, 8, &[])[..7].to_vec(), 0),
        ("a request without its body", message(2, 8, &[1; 3]), 0),
        (
            "more regions than the message holds",
            message(5, 8, &[200, 0, 0, 0, 0, 0, 0, 0]),
            0,
        ),
        ("descriptors where none belong", message(3, 0, &[]), 5),
        (
            "a region without its descriptor",
            message(5, 40, &[&[1, 0, 0, 0, 0, 0, 0, 0][..], &[0; 32]].concat()),
            0,
        ),
    ] {
        let mut vmm = bed.daemon.stream();
        let mut connection = Connection::new(vmm.try_clone().expect("cloned"));
        connection.send_raw(&bytes, &vec![null.as_fd(); descriptors]);
        // An error is ignored: the daemon may have closed the connection already.
        let _ = vmm.write_all(&[0; 5]);
        let _ = vmm.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = vmm.read_to_end(&mut answer);
        bed.assert_works(what);
    }
    bed.assert_logged("the connection was closed: ");
}

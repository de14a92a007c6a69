//! The daemon dies, or is replaced, between the client and the server of an emulated device, and both are under load: they
//! must notice nothing.

use std::collections::HashMap;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::connection::{
    Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, Msg, NO_REPLY, REGION_READ, REGION_WRITE,
    VERSION, dma, region, version_body,
};

const IOVA: u64 = 0x7000_0000;
/// The page that the server reads, and the one that it writes.
const READ_GPA: u64 = 0xa0_0000;
const WRITTEN_GPA: u64 = 0xa0_1000;
const IN_FLIGHT: usize = 8;
const TEXT: &str = r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}"#;
const TWIN_TEXT: &str = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;

/// Restarts of a planned end in a run of the suite.
fn planned() -> u32 {
    kills() / 2
}

struct Bed {
    keeper: Keeper,
    daemon: Daemon,
    guest: Guest,
    client: PathBuf,
    listener: UnixListener,
    _folder: TempDir,
}

impl Bed {
    fn new(isolation: &str) -> Self {
        Self::with(isolation, false)
    }

    /// `added`: by `ctl`.
    fn with(isolation: &str, added: bool) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (client, server) = (folder.path().join("client"), folder.path().join("server"));
        let listener = UnixListener::bind(&server).expect("a socket");
        let keys = format!(
            "address = '00:06.0'\nvfio-user = {{ listen = {client:?}, connect = {server:?}, isolation = '{isolation}', \
             deadline-ms = 20000 }}"
        );
        let other = folder.path().join("other");
        let file = if added {
            // Its socket makes the folder one of those that later endpoints can use.
            format!(
                "hotplug = ['00:06.0']\n[[endpoint]]\naddress = '00:09.0'\n\
                 vfio-user = {{ listen = {other:?}, connect = {server:?} }}\n"
            )
        } else {
            format!("[[endpoint]]\n{keys}\n")
        };
        let keeper = Keeper::empty();
        let toml = format!("address = '00:05.0'\nbypass = false\n{file}");
        let daemon = Daemon::kept_with_config(&keeper, &toml, &[]);
        if added {
            let answer = daemon.control(&format!("add-endpoint {}", keys.replace('\n', ", ")));
            assert!(answer["error"].is_null(), "{answer}");
        }
        let mut guest = Guest::boot(&daemon);
        assert_eq!(guest.attach(1, EP), OK);
        assert_eq!(guest.map_page(1, IOVA, READ_GPA), OK);
        assert_eq!(guest.map_page(1, IOVA + PAGE, WRITTEN_GPA), OK);
        let pattern: Vec<u8> = (0..PAGE).map(|at| (at / 3) as u8).collect();
        guest.memory.write(READ_GPA, &pattern);
        Self {
            keeper,
            daemon,
            guest,
            client,
            listener,
            _folder: folder,
        }
    }

    fn end_by_plan(&mut self) {
        self.daemon.terminate();
        self.daemon.wait_for_end();
        self.daemon.start_again(&mut self.keeper);
    }

    fn assert_nothing_lost(&self) {
        let life = &self.daemon.status()["life"];
        assert_eq!(life["lost"].as_array().map(Vec::len), Some(0), "{life}");
    }

    fn emulated(&self) -> serde_json::Value {
        let status = self.daemon.status();
        let devices = status["emulated"].as_array().expect("a list");
        let ours = devices.iter().find(|device| device["id"] == EP);
        ours.expect("the device").clone()
    }
}

/// What the threads of a test have in common.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Connections to the server.
    accepted: AtomicU32,
    /// Accesses of the client, and of the server.
    client_done: AtomicU64,
    server_done: AtomicU64,
    /// Windows that the server has.
    windows: AtomicU64,
}

impl Shared {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// The data of a region access at an offset.
fn data(offset: u64, len: usize) -> Vec<u8> {
    let at = |n: usize| (offset.wrapping_mul(0x9e37_79b9) >> (n % 24)) as u8 ^ n as u8;
    (0..len).map(at).collect()
}

/// The server: answers the client's accesses, and accesses memory all the time. `twin`: over a socket of its own.
fn serve(listener: &UnixListener, shared: &Arc<Shared>, twin: bool) -> JoinHandle<()> {
    let listener = listener.try_clone().expect("a copy");
    let shared = shared.clone();
    thread::spawn(move || {
        while !shared.is_over() {
            let (stream, _) = listener.accept().expect("a connection");
            if shared.is_over() {
                return;
            }
            shared.accepted.fetch_add(1, Ordering::Relaxed);
            shared.windows.store(0, Ordering::Relaxed);
            serve_one(Connection::new(stream), &shared, twin);
        }
    })
}

fn serve_one(mut server: Connection, shared: &Arc<Shared>, twin: bool) {
    let Some(version) = server.recv() else { return };
    assert_eq!(version.cmd, VERSION);
    let mut device = None;
    if twin {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        use std::os::fd::AsFd;
        server.reply(&version, &version_body(TWIN_TEXT), &[theirs.as_fd()]);
        let shared = shared.clone();
        device = Some(thread::spawn(move || {
            access_memory(Connection::new(ours), &shared);
        }));
    } else {
        server.reply(&version, &version_body(TEXT), &[]);
    }
    let mut engine = Engine::default();
    while let Some(msg) = server.recv() {
        let flags = msg.flags;
        match msg.cmd {
            DMA_MAP => {
                shared.windows.fetch_add(1, Ordering::Relaxed);
                server.reply(&msg, &[], &[]);
            }
            DMA_UNMAP => {
                shared.windows.fetch_sub(1, Ordering::Relaxed);
                server.reply(&msg, &msg.body, &[]);
            }
            REGION_READ => {
                let data = data(msg.u64_at(0), msg.u32_at(12) as usize);
                server.reply(&msg, &[&msg.body[..], &data].concat(), &[]);
            }
            REGION_WRITE if flags & NO_REPLY != 0 => {}
            REGION_WRITE => {
                assert!(msg.body[16..] == data(msg.u64_at(0), msg.u32_at(12) as usize));
                server.reply(&msg, &msg.body[..16], &[]);
            }
            DMA_READ | DMA_WRITE => engine.complete(&msg, shared),
            other => panic!("command {other}"),
        }
        if !twin && shared.windows.load(Ordering::Relaxed) > 0 && !shared.is_over() {
            engine.ask(&mut server);
        }
    }
    if let Some(device) = device {
        device.join().expect("the device's accesses");
    }
}

/// The device's accesses to memory.
#[derive(Default)]
struct Engine {
    in_flight: HashMap<u16, u64>,
    next: u64,
}

impl Engine {
    fn ask(&mut self, to: &mut Connection) {
        while self.in_flight.len() < IN_FLIGHT {
            let n = self.next;
            self.next += 1;
            let len = 8 + n * 37 % 4000;
            let id = if n.is_multiple_of(3) {
                let value = [n.to_le_bytes(); 8].concat();
                to.ask(DMA_WRITE, &dma(IOVA + PAGE, 64, &value), &[])
            } else {
                to.ask(DMA_READ, &dma(IOVA, len, &[]), &[])
            };
            assert!(self.in_flight.insert(id, n).is_none(), "the id is in use");
        }
    }

    fn complete(&mut self, reply: &Msg, shared: &Shared) {
        let n = self.in_flight.remove(&reply.id).expect("a reply once");
        assert_eq!(reply.errno(), 0, "access {n}");
        if !n.is_multiple_of(3) {
            let right = reply.body[16..].iter().enumerate();
            assert!(right.clone().all(|(at, byte)| *byte == (at / 3) as u8));
            assert_eq!(right.count() as u64, 8 + n * 37 % 4000);
        }
        shared.server_done.fetch_add(1, Ordering::Relaxed);
    }
}

/// A server that makes its accesses over a second socket.
fn access_memory(mut twin: Connection, shared: &Shared) {
    let mut engine = Engine::default();
    // Not before it has a window.
    while shared.windows.load(Ordering::Relaxed) == 0 && !shared.is_over() {
        thread::sleep(Duration::from_millis(1));
    }
    engine.ask(&mut twin);
    while let Some(reply) = twin.recv() {
        engine.complete(&reply, shared);
        if shared.is_over() {
            return;
        }
        engine.ask(&mut twin);
    }
}

/// The client: several accesses in flight, all the time. Ends when the test stops it and all have their replies. Returns
/// the number of refusals.
fn drive(path: &std::path::Path, shared: &Arc<Shared>) -> JoinHandle<u64> {
    let mut client = Connection::new(UnixStream::connect(path).expect("connected"));
    let answer = client.call(VERSION, &version_body(TEXT), &[]);
    assert_eq!(answer.errno(), 0);
    let shared = shared.clone();
    thread::spawn(move || {
        let mut in_flight = HashMap::new();
        let mut next = 0u64;
        let mut refused = 0;
        loop {
            while in_flight.len() < IN_FLIGHT && !shared.is_over() {
                let len = 1 + (next * 53 % 3000) as usize;
                let count = len as u32;
                let id = match next % 4 {
                    0 => client.ask(REGION_WRITE, &region(next, 1, count, &data(next, len)), &[]),
                    _ => client.ask(REGION_READ, &region(next, 1, count, &[]), &[]),
                };
                assert!(in_flight.insert(id, (next, len)).is_none());
                next += 1;
            }
            if in_flight.is_empty() {
                return refused;
            }
            let reply = client.recv().expect("the connection goes on");
            let (n, len) = in_flight.remove(&reply.id).expect("a reply once");
            if reply.errno() != 0 {
                refused += 1;
                continue;
            }
            match n % 4 {
                0 => assert_eq!(reply.body.len(), 16),
                _ => assert!(reply.body[16..] == data(n, len), "access {n}"),
            }
            shared.client_done.fetch_add(1, Ordering::Relaxed);
        }
    })
}

/// Runs the load while `act` ends daemons. Returns the number of connections to the server, and of refused accesses.
fn under_load(bed: &mut Bed, twin: bool, act: impl FnOnce(&mut Bed)) -> (u32, u64) {
    let shared = Arc::new(Shared::default());
    let server = serve(&bed.listener, &shared, twin);
    let client = drive(&bed.client, &shared);
    let done = || {
        let done = [&shared.client_done, &shared.server_done];
        done.map(|n| n.load(Ordering::Relaxed))
    };
    bed.daemon
        .wait_for("accesses", || done().iter().all(|n| *n > 10));
    act(bed);
    // Both still go on.
    let before = done();
    bed.daemon.wait_for("more accesses", || {
        done()
            .iter()
            .zip(before)
            .all(|(now, before)| *now > before + 10)
    });
    println!("accesses of the client and of the server: {:?}", done());
    shared.stop.store(true, Ordering::Release);
    let refused = client.join().expect("the client");
    // Its client has gone: the server's connection ends.
    let accepted = shared.accepted.load(Ordering::Relaxed);
    let _ = UnixStream::connect(bed.listener.local_addr().unwrap().as_pathname().unwrap());
    server.join().expect("the server");
    (accepted, refused)
}

fn kill_at_random(bed: &mut Bed) {
    let mut rng = Rng::new(77);
    for _ in 0..kills() {
        thread::sleep(Duration::from_micros(rng.below(8000)));
        bed.daemon.die(&mut bed.keeper);
    }
}

fn replace_by_plan(bed: &mut Bed) {
    let mut rng = Rng::new(78);
    for _ in 0..planned() {
        thread::sleep(Duration::from_micros(rng.below(8000)));
        bed.end_by_plan();
    }
}

fn check(isolation: &str, twin: bool, act: impl FnOnce(&mut Bed)) {
    check_in(Bed::new(isolation), twin, act);
}

fn check_in(mut bed: Bed, twin: bool, act: impl FnOnce(&mut Bed)) {
    let (accepted, refused) = under_load(&mut bed, twin, |bed| {
        act(bed);
        bed.assert_nothing_lost();
        let state = bed.emulated();
        assert_eq!(
            (&state["client"], &state["server"]),
            (&true.into(), &true.into())
        );
        assert_eq!(
            (&state["refused"], &state["cut_offs"]),
            (&0.into(), &0.into())
        );
    });
    assert_eq!((accepted, refused), (1, 0));
    // The connections have ended, and the keeper has none of them any more.
    bed.daemon
        .wait_for("the client's end", || bed.emulated()["client"] == false);
    let sockets = ["client", "server", "twin"].map(|leg| format!("vfio-user.{EP}.{leg}"));
    let Bed { daemon, keeper, .. } = &mut bed;
    daemon.wait_for("the keeper's end of the sockets", || {
        keeper.take();
        !sockets.iter().any(|name| keeper.files.contains_key(name))
    });
}

#[test]
fn both_peers_notice_no_kill() {
    check("messages", false, kill_at_random);
}

#[test]
fn both_peers_notice_no_planned_end() {
    check("messages", false, replace_by_plan);
}

/// The same device, which `ctl` has added, and removes at the end.
#[test]
fn peers_of_an_added_device_notice_no_end() {
    for isolation in ["messages", "mappings"] {
        check_in(Bed::with(isolation, true), false, |bed| {
            for _ in 0..kills() / 4 {
                bed.daemon.die(&mut bed.keeper);
                bed.end_by_plan();
            }
        });
    }
    check_in(Bed::with("messages", true), true, kill_at_random);
    let mut bed = Bed::with("messages", true);
    bed.daemon.die(&mut bed.keeper);
    let answer = bed.daemon.control("remove-endpoint 00:06.0");
    assert!(answer["error"].is_null(), "{answer}");
    bed.daemon.die(&mut bed.keeper);
    assert_eq!(bed.guest.attach(1, EP), NOENT);
    bed.keeper.take();
    let names = bed.keeper.files.keys();
    let of_device = format!("vfio-user.{EP}.");
    assert_eq!(names.filter(|name| name.starts_with(&of_device)).count(), 0);
    bed.assert_nothing_lost();
}

#[test]
fn a_server_with_a_second_socket_notices_no_end() {
    check("messages", true, kill_at_random);
    check("messages", true, replace_by_plan);
}

#[test]
fn a_server_with_memory_notices_no_end_while_its_windows_stay() {
    check("mappings", false, kill_at_random);
    check("mappings", false, replace_by_plan);
}

/// The guest maps and unmaps all the time. Who dies in the middle of it leaves a server that must give its memory up.
#[test]
fn a_server_with_memory_gives_it_up_if_the_daemon_dies_while_it_changes_windows() {
    let mut bed = Bed::new("mappings");
    let (accepted, _) = under_load(&mut bed, false, |bed| {
        let mut rng = Rng::new(79);
        for page in 0..u64::from(kills() / 2) {
            let first = (page + 16) * PAGE;
            let bytes = wire::map(1, first, first + PAGE - 1, READ_GPA, RW);
            bed.guest.submit(&bytes, &Layout::plain(bytes.len(), TAIL));
            bed.guest.kick();
            thread::sleep(Duration::from_micros(rng.below(600)));
            bed.daemon.die(&mut bed.keeper);
            let (_, reply) = bed.guest.complete();
            assert_eq!(reply.status(), OK);
            assert_eq!(bed.guest.unmap(1, first, first + PAGE - 1), OK);
        }
        let state = bed.daemon.endpoint(EP);
        assert_ne!(state["state"], "quarantined", "{state}");
    });
    println!("the server has connected {accepted} times");
}

/// The server does not hang up when its connection is half closed. Its endpoint is blocked.
#[test]
fn a_server_that_keeps_memory_is_blocked_and_that_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let (client, server) = (folder.path().join("client"), folder.path().join("server"));
    let listener = UnixListener::bind(&server).expect("a socket");
    let toml = format!(
        "address = '00:05.0'\nbypass = false\n[[endpoint]]\naddress = '00:06.0'\n\
         vfio-user = {{ listen = {client:?}, connect = {server:?}, isolation = 'mappings', \
         deadline-ms = 500 }}\n"
    );
    let mut keeper = Keeper::empty();
    let mut daemon = Daemon::kept_with_config(&keeper, &toml, &[]);
    let mut guest = Guest::boot(&daemon);
    assert_eq!(guest.attach(1, EP), OK);
    assert_eq!(guest.map_page(1, IOVA, READ_GPA), OK);
    let mut client = Connection::new(UnixStream::connect(&client).expect("connected"));
    client.ask(VERSION, &version_body(TEXT), &[]);
    let mut server = Connection::new(listener.accept().expect("a connection").0);
    let version = server.recv().expect("VERSION");
    server.reply(&version, &version_body(TEXT), &[]);
    assert_eq!(client.recv().expect("an answer").errno(), 0);
    // It never answers the announcement.
    assert_eq!(server.recv().expect("a window").cmd, DMA_MAP);
    client.ask(REGION_READ, &region(0, 1, 4, &[]), &[]);
    thread::sleep(Duration::from_millis(50));
    daemon.die(&mut keeper);
    daemon.wait_for("quarantine", || {
        daemon.endpoint(EP)["state"] == "quarantined"
    });
    assert_eq!(daemon.status()["emulated"][0]["keeps_memory"], true);
    // The next daemon waits for the same server.
    daemon.die(&mut keeper);
    assert_eq!(daemon.status()["emulated"][0]["keeps_memory"], true);
    assert_eq!(daemon.endpoint(EP)["state"], "quarantined");
    drop(server);
    daemon.wait_for("the hang-up", || {
        daemon.status()["emulated"][0]["keeps_memory"] == false
    });
}

//! What becomes of a client and a server that an earlier process has left. Each record differs in one thing from that of a
//! server with exactly the windows that it should have.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{Deadlines, EmulatedDevice, Isolation, KeptDevice, Watch, start_kept};
use crate::address::{IovaRange, Mapping};
use crate::backends::testing::slot;
use crate::backends::{Adoption, BackendError, Contents, DmaBackend, Target};
use crate::faults::{Fault, FaultSink};
use crate::ids::{DomainId, EndpointId};
use crate::page_table::{Levels, TableOffset, TableReader};
use crate::process::keeper::Keeper;
use crate::process::keeper_testing::Manager;
use crate::process::life::Life;
use crate::vfio_user::message::{Command, HEADER_BYTES, Header, Kind};
use crate::vfio_user::testing::{ENDPOINT, Left, LeftPeers, client_of, command, commands_of};

/// The word of [`Target::Bypass`] in the record, and that of [`Target::Blocked`].
const BYPASS: u64 = 2;
const BLOCKED: u64 = 1;
const DOMAIN: DomainId = DomainId(4);
/// Nothing that works takes so long.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct NoFaults;

impl FaultSink for NoFaults {
    fn report(&self, fault: Fault) {
        panic!("{fault:?}");
    }
}

/// No domain has a table.
struct NoTables;

impl Contents for NoTables {
    fn mappings(&self, _: DomainId) -> Box<dyn Iterator<Item = Mapping> + '_> {
        Box::new(std::iter::empty())
    }

    fn table(&self, _: DomainId) -> Option<(TableOffset, Levels)> {
        None
    }

    fn reader(&self, _: DomainId) -> Option<TableReader> {
        None
    }
}

/// The process that takes over.
struct Next {
    manager: Manager,
    keeper: Arc<Keeper>,
    life: Arc<Life>,
    backend: Box<dyn DmaBackend>,
    watch: Watch,
    peers: LeftPeers,
    _folder: tempfile::TempDir,
}

impl Next {
    /// The process has one region of RAM. `goes_on`: the core takes the state over.
    fn new(left: &Left, isolation: Isolation, goes_on: bool) -> Self {
        Self::with(left, isolation, goes_on, |_| ())
    }

    /// The same, after a change of what the keeper has.
    fn with(
        left: &Left,
        isolation: Isolation,
        goes_on: bool,
        change: impl FnOnce(&Manager),
    ) -> Self {
        let mut manager = Manager::new();
        let peers = left.keep_with(&manager.keeper());
        manager.settle();
        change(&manager);
        let keeper = manager.keeper();
        let life = Arc::new(Life::new(true));
        let kept = KeptDevice::open(&keeper, &life, ENDPOINT, "device", goes_on);
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("client")).expect("a socket");
        let device = EmulatedDevice {
            endpoint: ENDPOINT,
            name: "device".into(),
            server: folder.path().join("server"),
            isolation,
            max_windows: 64,
            reserved: Vec::new(),
            deadlines: Deadlines::with_answer(Duration::from_millis(200)),
            answers_all_accesses: false,
        };
        let kept = Some(kept.expect("room"));
        let (mut backend, watch) =
            start_kept(device, listener, Arc::new(NoFaults), kept).expect("a backend");
        backend.add_memory(&slot(0, 0x10_0000, 0)).expect("told");
        for peer in [&peers.client, &peers.server, &peers.twin] {
            peer.set_read_timeout(Some(PATIENCE)).expect("set");
        }
        Self {
            manager,
            keeper,
            life,
            backend,
            watch,
            peers,
            _folder: folder,
        }
    }

    fn adopt(
        &mut self,
        target: Target,
        change: impl FnOnce(&mut Adoption<'_>),
    ) -> Vec<(EndpointId, BackendError)> {
        let endpoints = [(ENDPOINT, target)];
        let mut adoption = Adoption {
            endpoints: &endpoints,
            quarantined: &[],
            moving: &[],
            in_progress: &[],
            records: &[],
            is_memory_same: true,
        };
        change(&mut adoption);
        self.backend.adopt(&adoption, &NoTables)
    }

    /// Whether the server's connection goes on.
    fn has_server(&self) -> bool {
        self.watch.state().ends.server
    }

    fn keeps_memory(&self) -> bool {
        self.watch.state().ends.keeps_memory
    }

    fn eventually(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Something was lost, and the text says so.
    fn assert_lost(&self, what: &str) {
        let lost = self.life.lost().join("; ");
        assert!(lost.contains(what), "{what:?} in {lost:?}");
    }
}

/// The next message.
fn receive(mut stream: &UnixStream) -> Option<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    match stream.read_exact(&mut head) {
        Ok(()) => {}
        Err(cause) if cause.kind() == ErrorKind::UnexpectedEof => return None,
        Err(cause) => panic!("{cause}"),
    }
    let header = Header::decode(&head).expect("a header");
    let mut body = vec![0; header.body_len];
    stream.read_exact(&mut body).expect("a body");
    Some((header, body))
}

fn bypass() -> Left {
    Left {
        windows_of: BYPASS,
        ..Left::default()
    }
}

#[test]
fn a_server_with_exactly_its_windows_goes_on() {
    let mut next = Next::new(&bypass(), Isolation::Mappings, true);
    assert!(next.adopt(Target::Bypass, |_| ()).is_empty());
    assert!(next.has_server() && !next.keeps_memory());
    assert_eq!(next.life.lost(), [""; 0]);
    // It has the windows of the earlier process, so it has to give memory up if it is cut off.
    next.backend.quarantine(ENDPOINT);
    assert!(next.keeps_memory());
}

/// The server may still use the memory: its connection is half closed, until it hangs up.
#[test]
fn a_server_with_other_windows_must_give_its_memory_up() {
    type Change = fn(&mut Adoption<'_>);
    let other = || Left {
        windows_of: BYPASS + 1,
        ..Left::default()
    };
    let of = |windows_of| Left {
        windows_of,
        ..Left::default()
    };
    let same: Change = |_| ();
    let cases: [(Left, Target, Change, &str); 6] = [
        (
            of(BLOCKED),
            Target::Blocked,
            |adoption| adoption.quarantined = &[ENDPOINT],
            "is quarantined",
        ),
        (
            bypass(),
            Target::Bypass,
            |adoption| adoption.is_memory_same = false,
            "while it changed the server's windows",
        ),
        (
            of(3 + u64::from(DOMAIN.0)),
            Target::Domain(DOMAIN),
            |adoption| adoption.in_progress = &[(DOMAIN, IovaRange::ALL)],
            "while it changed the server's windows",
        ),
        (other(), Target::Bypass, same, "does not have exactly"),
        (
            Left {
                is_settled: false,
                ..bypass()
            },
            Target::Bypass,
            same,
            "does not have exactly",
        ),
        (
            Left {
                is_announced: false,
                ..bypass()
            },
            Target::Bypass,
            same,
            "while it told the server all windows",
        ),
    ];
    for (left, target, change, why) in cases {
        let mut next = Next::new(&left, Isolation::Mappings, true);
        let failed = next.adopt(target, change);
        assert_eq!(failed.len(), 1, "{why}: nobody waits for ever");
        assert!(next.keeps_memory() && !next.has_server(), "{why}");
        next.assert_lost(why);
        assert!(receive(&next.peers.server).is_none(), "{why}");
        // The process after that waits for it, too.
        let keeper = next.manager.keeper();
        let life = Arc::new(Life::new(true));
        KeptDevice::open(&keeper, &life, ENDPOINT, "device", true).expect("room");
        assert!(keeper.names().contains(&"vfio-user.48.server".to_owned()));
        drop(next.peers.server);
        let until = Instant::now() + PATIENCE;
        while next.watch.state().ends.keeps_memory {
            assert!(Instant::now() < until, "{why}: it has hung up");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Nobody has to wait for a server without memory.
#[test]
fn a_server_without_memory_is_closed_at_once() {
    for is_announced in [true, false] {
        let left = Left {
            shares_memory: false,
            is_settled: false,
            is_announced,
            has_twin: true,
            commands: vec![command(3)],
            ..bypass()
        };
        let mut next = Next::new(&left, Isolation::Mappings, true);
        assert!(next.adopt(Target::Bypass, |_| ()).is_empty());
        assert!(!next.keeps_memory() && !next.has_server());
        assert!(receive(&next.peers.server).is_none());
        assert!(receive(&next.peers.twin).is_none(), "its second socket");
        // The client's command has a refusal, and the client stays.
        let (header, _) = receive(&next.peers.client).expect("a refusal");
        assert_eq!(header.id, 3);
        assert!(matches!(header.kind, Kind::Refusal(_)), "{header:?}");
        assert!(next.watch.state().ends.client);
    }
}

/// Also one that reaches memory by messages alone.
#[test]
fn a_quarantined_device_has_no_server() {
    let left = Left {
        shares_memory: false,
        ..Left::default()
    };
    let mut next = Next::new(&left, Isolation::Messages, true);
    let quarantined = |adoption: &mut Adoption<'_>| adoption.quarantined = &[ENDPOINT];
    assert!(next.adopt(Target::Blocked, quarantined).is_empty());
    assert!(!next.has_server());
    next.assert_lost("is quarantined");
    assert!(receive(&next.peers.server).is_none());
}

/// The peers get nothing before the endpoint has its target.
#[test]
fn messages_wait_for_the_target() {
    let mut next = Next::new(&bypass(), Isolation::Mappings, true);
    let message = Header::command(9, Command::DeviceReset, 0).encode();
    (&next.peers.client).write_all(&message).expect("sent");
    let server = &next.peers.server;
    server
        .set_read_timeout(Some(Duration::from_millis(100)))
        .expect("set");
    let early = (&*server).read(&mut [0]);
    assert_eq!(
        early.expect_err("nothing yet").kind(),
        ErrorKind::WouldBlock
    );
    server.set_read_timeout(Some(PATIENCE)).expect("set");
    next.adopt(Target::Bypass, |_| ());
    let (header, _) = receive(&next.peers.server).expect("the message");
    assert_eq!(header.command, Command::DeviceReset.number());
    // A number that the earlier process has not given.
    assert!(header.id >= 100, "{}", header.id);
}

/// Without the earlier process's state nobody goes on with its connections.
#[test]
fn connections_end_with_a_state_that_is_refused() {
    let next = Next::new(&bypass(), Isolation::Mappings, false);
    assert!(receive(&next.peers.client).is_none());
    next.assert_lost("ends with the state");
    assert!(!next.watch.state().ends.client);
}

#[test]
fn a_client_that_the_keeper_has_lost_is_lost_once() {
    let mut next = Next::with(&bypass(), Isolation::Mappings, true, |manager| {
        manager.with_files(|files| files.remove("vfio-user.48.client"));
    });
    next.adopt(Target::Bypass, |_| ());
    next.assert_lost("lost the client's connection");
    assert!(!next.has_server(), "it has no client");
    drop(next.peers.server);
    let keeper = next.manager.keeper();
    let life = Arc::new(Life::new(true));
    let kept = KeptDevice::open(&keeper, &life, ENDPOINT, "device", true).expect("room");
    assert_eq!(
        client_of(&kept),
        "Some(None)",
        "the record says that it has gone"
    );
}

/// What a client has of its server is useless after that server is gone; and interrupts that an earlier process has got
/// cannot be set again.
#[test]
fn a_client_that_depends_on_its_server_ends_with_it() {
    let plain = || Left {
        shares_memory: false,
        windows_of: 1,
        ..Left::default()
    };
    for (left, why) in [
        (plain(), None),
        (
            Left {
                client_holds_descriptors: true,
                ..plain()
            },
            Some(""),
        ),
        (
            Left {
                client_has_interrupts: true,
                ..plain()
            },
            Some("interrupts were set before"),
        ),
    ] {
        let left = Left {
            commands: vec![command(3)],
            ..left
        };
        let mut next = Next::new(&left, Isolation::Messages, true);
        assert!(next.adopt(Target::Blocked, |_| ()).is_empty());
        assert!(next.has_server());
        next.peers
            .server
            .shutdown(std::net::Shutdown::Both)
            .expect("connected");
        let reply = receive(&next.peers.client);
        match why {
            None => assert_eq!(reply.expect("a refusal").0.id, 3),
            Some(why) => {
                assert!(reply.is_none(), "{reply:?}");
                next.assert_lost(why);
            }
        }
    }
}

/// Descriptors die with a process. What may have come with some, or was to go with some, cannot be gone on with.
#[test]
fn lost_descriptors_end_the_connection_that_they_belong_to() {
    let plain = || Left {
        shares_memory: false,
        windows_of: 1,
        ..Left::default()
    };
    // DEVICE_SET_IRQS with an eventfd: argsz, flags, index, start, count.
    let set: Vec<u8> = [20u32, 0x24, 2, 0, 1]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    let set = Header::command(5, Command::DeviceSetIrqs, 0).with_body(&set);
    let asked = Header::command(3, Command::DeviceGetRegionInfo, 32);
    let reply = Header {
        id: 7,
        ..asked.reply_to(32)
    };
    let cases = [
        (
            Left {
                from_client: set,
                ..plain()
            },
            "with the descriptors of its interrupts",
            false,
        ),
        (
            Left {
                from_server: reply.with_body(&[0; 32]),
                commands: vec![asked],
                ..plain()
            },
            "with the descriptors of its reply",
            true,
        ),
        (
            Left {
                has_unsent_descriptors: true,
                ..plain()
            },
            "while it sent a message with descriptors",
            false,
        ),
    ];
    for (left, why, stays) in cases {
        let mut next = Next::new(&left, Isolation::Messages, true);
        next.adopt(Target::Blocked, |_| ());
        next.eventually(why, |next| !next.life.lost().is_empty());
        next.assert_lost(why);
        next.eventually(why, |next| !next.has_server());
        assert_eq!(next.watch.state().ends.client, stays, "{why}");
    }
}

/// A later process must not refuse a client commands that another one has sent.
#[test]
fn the_commands_of_a_client_end_with_it() {
    let left = Left {
        shares_memory: false,
        commands: vec![command(3), command(4)],
        ..Left::default()
    };
    let mut next = Next::new(&left, Isolation::Messages, true);
    next.adopt(Target::Blocked, |_| ());
    next.peers
        .client
        .shutdown(std::net::Shutdown::Both)
        .expect("connected");
    next.eventually("its end", |next| !next.watch.state().ends.client);
    next.eventually("its socket's end", |next| {
        !next.keeper.names().contains(&"vfio-user.48.client".into())
    });
    let keeper = next.manager.keeper();
    let life = Arc::new(Life::new(true));
    let kept = KeptDevice::open(&keeper, &life, ENDPOINT, "device", true).expect("room");
    assert_eq!(commands_of(&kept), 0);
}

/// A reply that an earlier process has taken, or to an update of that process, is none of this one's commands.
#[test]
fn replies_to_updates_of_an_earlier_process_are_taken() {
    let plain = Left {
        shares_memory: false,
        ..Left::default()
    };
    for (command, is_refusal, is_taken) in [
        (Command::DmaMap, false, true),
        (Command::DmaUnmap, false, true),
        (Command::DeviceSetIrqs, true, true),
        // The server lacks a window that it should have.
        (Command::DmaMap, true, false),
        (Command::RegionRead, false, false),
    ] {
        let mut next = Next::new(&plain, Isolation::Messages, true);
        next.adopt(Target::Blocked, |_| ());
        let update = Header::command(50, command, 0);
        let reply = if is_refusal {
            update.refusal_of(libc::ENOMEM)
        } else {
            update.reply_to(0)
        };
        (&next.peers.server)
            .write_all(&reply.encode())
            .expect("sent");
        if !is_taken {
            assert!(receive(&next.peers.server).is_none(), "{command:?}");
            next.eventually("its end", |next| !next.has_server());
            continue;
        }
        // The connection goes on.
        let reset = Header::command(9, Command::DeviceReset, 0).encode();
        (&next.peers.client).write_all(&reset).expect("sent");
        let (header, _) = receive(&next.peers.server).expect("the client's command");
        (&next.peers.server)
            .write_all(&header.reply_to(0).encode())
            .expect("sent");
        let (reply, _) = receive(&next.peers.client).expect("its reply");
        assert_eq!((reply.id, reply.kind), (9, Kind::Reply), "{command:?}");
        assert!(next.has_server(), "{command:?}");
    }
}

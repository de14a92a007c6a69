//! The whole daemon between a guest's driver and a device's server.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use vhost_device_iommu::args::Question;
use vhost_device_iommu::ctl;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bed::{CLIENT_TEXT, ScriptedServer, accept, event, eventually, start_scripted_server};
use crate::common::daemon::{Daemon, EP};
use crate::common::guest::{Guest, Layout, Setup};
use crate::common::wire::{self, TAIL};
use crate::connection::{
    Connection, DMA_MAP, DMA_READ, DMA_UNMAP, DMA_WRITE, Msg, NO_REPLY, REGION_READ, SET_IRQS,
    VERSION, bytes, dma, irqs, region, version_body,
};

const IOVA: u64 = 0x7000_0000;
/// A guest-physical address in the first memory slot.
const PAGE: u64 = 0xa0_0000;
const SOON: Duration = Duration::from_secs(30);

/// A daemon with one emulated device at 00:06.0. The test takes the roles of its client and its server.
pub struct DaemonBed {
    pub daemon: Daemon,
    /// That of the server.
    pub listener: UnixListener,
    client_path: PathBuf,
    _folder: TempDir,
}

impl DaemonBed {
    pub fn new(isolation: &str) -> Self {
        Self::with(Daemon::with_config, isolation)
    }

    fn with(start: fn(&str) -> Daemon, isolation: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let client_path = folder.path().join("client");
        let server_path = folder.path().join("server");
        let listener = UnixListener::bind(&server_path).expect("a socket");
        let daemon = start(&format!(
            "address = '00:05.0'\nbypass = false\n[[endpoint]]\naddress = '00:06.0'\n\
             vfio-user = {{ listen = {client_path:?}, connect = {server_path:?}, \
             isolation = '{isolation}', announce = 'exact', deadline-ms = 15000 }}\n\
             [metrics]\nsocket = {:?}\n",
            folder.path().join("metrics"),
        ));
        Self {
            daemon,
            listener,
            client_path,
            _folder: folder,
        }
    }

    fn client(&self) -> Connection {
        Connection::new(UnixStream::connect(&self.client_path).expect("connected"))
    }

    /// A server that runs `script` (see [`start_scripted_server`]), and a client that has negotiated with it.
    fn pair(
        &self,
        script: impl FnMut(&mut Connection, &mut Msg) -> bool + Send + 'static,
    ) -> (Connection, ScriptedServer) {
        let scripted = start_scripted_server(self.listener.try_clone().expect("cloned"), script);
        (self.negotiated_client(), scripted)
    }

    /// A client that has negotiated with the server that listens.
    pub fn negotiated_client(&self) -> Connection {
        let mut client = self.client();
        let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
        assert_eq!(answer.errno(), 0);
        client
    }

    /// A client and a server that have negotiated. The test sends all further messages.
    fn raw_pair(&self) -> (Connection, Connection) {
        let mut client = self.client();
        client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
        let mut server = accept(&self.listener);
        let request = server.recv().expect("VERSION");
        server.reply(&request, &version_body("{}"), &[]);
        assert_eq!(client.recv().expect("an answer").errno(), 0);
        (client, server)
    }
}

#[test]
fn a_device_reaches_mapped_memory_and_the_guest_gets_faults_for_the_rest() {
    let bed = DaemonBed::new("messages");
    // While UNMAP waits for the server, the server writes to another page and to the page being unmapped.
    let (mut client, scripted) = bed.pair(|server, msg| {
        if msg.cmd == DMA_UNMAP && msg.u64_at(8) == IOVA {
            let kept = dma(IOVA + 0x1000, 4, b"kept");
            assert_eq!(server.call(DMA_WRITE, &kept, &[]).errno(), 0);
            let gone = dma(IOVA, 4, b"gone");
            assert_eq!(server.call(DMA_WRITE, &gone, &[]).errno(), libc::EFAULT);
        }
        false
    });
    let mut guest = Guest::boot_with(&bed.daemon, Setup::default());
    guest.post_event_buffer(24);
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map_page(1, IOVA, PAGE), 0);
    assert_eq!(guest.map_page(1, IOVA + 0x1000, PAGE + 0x1000), 0);
    assert_eq!(guest.unmap(1, IOVA, IOVA + 0xfff), 0);
    assert_eq!(guest.memory.read(PAGE + 0x1000, 4), b"kept");
    assert_eq!(guest.memory.read(PAGE, 4), [0; 4]);
    let event = guest.take_event(SOON).expect("a fault");
    // Reason MAPPING; write, address valid; endpoint; address.
    assert_eq!(event.bytes[0], 2);
    assert_eq!(event.bytes[4..8], 0x102u32.to_le_bytes());
    assert_eq!(event.bytes[8..12], EP.to_le_bytes());
    assert_eq!(event.bytes[16..24], IOVA.to_le_bytes());
    let reply = client.call(REGION_READ, &region(3, 0, 4, &[]), &[]);
    assert_eq!(reply.body[16..], [3; 4]);
    assert!(!scripted.windows().contains(&IOVA));
}

#[test]
fn the_status_shows_connections_and_counters_of_emulated_devices() {
    let bed = DaemonBed::new("messages");
    let state = || {
        let status = bed.daemon.status();
        let list = status["emulated"].as_array().expect("a list").clone();
        assert_eq!(list.len(), 1);
        assert_eq!(
            (&list[0]["id"], &list[0]["address"]),
            (&EP.into(), &"0000:00:06.0".into())
        );
        let figure = |key: &str| list[0][key].as_u64().expect("a number");
        let connected = |key: &str| list[0][key].as_bool().expect("yes or no");
        let figures = (figure("windows"), figure("refused"), figure("cut_offs"));
        (connected("client"), connected("server"), figures)
    };
    assert_eq!(state(), (false, false, (0, 0, 0)));
    let mut guest = Guest::boot_with(&bed.daemon, Setup::default());
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map_page(1, IOVA, PAGE), 0);
    assert_eq!(state(), (false, false, (1, 0, 0)));
    let (client, mut server) = bed.raw_pair();
    server.recv().expect("a window");
    for _ in 0..3 {
        let refused = server.call(DMA_READ, &dma(0x1000, 4, &[]), &[]);
        assert_eq!(refused.errno(), libc::EFAULT);
    }
    assert_eq!(state(), (true, true, (1, 3, 0)));
    server.send_raw(&[0xff; 40], &[]);
    assert!(server.is_closed());
    assert_eq!(state(), (true, false, (1, 3, 1)));
    let text = ctl::render(&Question::Status, &bed.daemon.status());
    let line = "0000:00:06.0  emulated: the VMM is connected, the server is not connected; 1 windows, \
                3 accesses refused, 1 times cut off";
    assert!(text.contains(line), "{text}");
    let metrics = bed.client_path.with_file_name("metrics");
    let mut metrics = UnixStream::connect(metrics).expect("connected");
    let get = b"GET /metrics HTTP/1.1\r\n\r\n";
    metrics.write_all(get).expect("sent");
    let mut page = String::new();
    metrics.read_to_string(&mut page).expect("a page");
    for (name, count) in [
        ("cut_offs", 1),
        ("slow_cut_offs", 0),
        ("refused", 3),
        ("windows_refused", 0),
    ] {
        let labels = "vm=\"vm\",endpoint=\"0000:00:06.0\"";
        let line = format!("vhost_device_iommu_emulated_{name}_total{{{labels}}} {count}\n");
        assert!(page.contains(&line), "{line} in {page}");
    }
    drop(client);
    bed.daemon.wait_for("the client's end", || !state().0);
    assert_eq!(guest.unmap(1, IOVA, IOVA + 0xfff), 0);
    assert_eq!(state(), (false, false, (0, 3, 1)));
}

/// The server answers no window of the batch before it has all of them.
#[test]
fn the_maps_of_one_batch_wait_for_the_server_together() {
    const BATCH: u64 = 8;
    let bed = DaemonBed::new("messages");
    let mut guest = Guest::boot_with(&bed.daemon, Setup::default());
    assert_eq!(guest.attach(1, EP), 0);
    let (_client, mut server) = bed.raw_pair();
    let map = |guest: &mut Guest, n: u64| {
        let (first, gpa) = (IOVA + n * 0x1000, PAGE + n * 0x1000);
        let request = wire::map(1, first, first + 0xfff, gpa, wire::RW);
        let layout = Layout::plain(request.len(), TAIL);
        guest.submit(&request, &layout);
    };
    // While the server has not answered this one, the worker takes no request.
    map(&mut guest, BATCH);
    guest.kick();
    let single = server.recv().expect("a window");
    for n in 0..BATCH {
        map(&mut guest, n);
    }
    guest.kick();
    server.reply(&single, &[], &[]);
    let windows: Vec<_> = (0..BATCH)
        .map(|_| server.recv().expect("a window"))
        .collect();
    for window in &windows {
        server.reply(window, &[], &[]);
    }
    for _ in 0..=BATCH {
        assert_eq!(guest.complete().1.status(), 0);
    }
    assert_eq!(
        bed.daemon.status()["emulated"][0]["windows"],
        BATCH + 1,
        "all are mapped"
    );
}

/// The stock driver ignores the status of a MAP, so the guest gets an event. The operator finds the cure in the log, once,
/// and the missing windows in the status.
#[test]
fn a_limit_of_the_server_is_told_to_the_guest_and_the_operator() {
    let bed = DaemonBed::new("messages");
    let mut windows = 0;
    let (client, _server) = bed.pair(move |server, msg| {
        windows += u32::from(msg.cmd == DMA_MAP);
        let refused = msg.cmd == DMA_MAP && windows > 2;
        if refused {
            server.refuse(msg, libc::EINVAL.unsigned_abs());
        }
        refused
    });
    let mut guest = Guest::boot_with(&bed.daemon, Setup::default());
    guest.post_event_buffer(24);
    assert_eq!(guest.attach(1, EP), 0);
    let statuses: Vec<_> = (0..4)
        .map(|n| guest.map_page(1, IOVA + n * 0x1000, PAGE))
        .collect();
    assert_eq!(statuses, [0, 0, wire::NOMEM, wire::NOMEM]);
    let event = guest.take_event(SOON).expect("an event");
    // Reason MAPPING; read, write, address valid; endpoint; address.
    assert_eq!(event.bytes[0], 2);
    assert_eq!(event.bytes[4..8], 0x103u32.to_le_bytes());
    assert_eq!(event.bytes[8..12], EP.to_le_bytes());
    assert_eq!(event.bytes[16..24], (IOVA + 0x2000).to_le_bytes());
    let told = "Invalid argument (os error 22); it has 2 windows, which seems to be its limit";
    let log = || bed.daemon.log();
    bed.daemon.wait_for("the log", || log().contains(told));
    assert_eq!(log().matches(told).count(), 1, "{}", log());
    assert!(log().contains("max_regions"), "{}", log());
    let device = || bed.daemon.status()["emulated"][0].clone();
    let figures = |device: serde_json::Value| {
        [
            "windows",
            "windows_missing",
            "windows_limit",
            "windows_refused",
        ]
        .map(|figure| device[figure].as_u64().expect("a number"))
    };
    assert_eq!(figures(device()), [2, 0, 2, 2]);
    // A server that takes fewer windows than there are mappings.
    drop(client);
    bed.daemon
        .wait_for("the client's end", || device()["client"] == false);
    let (_client, mut server) = bed.raw_pair();
    for errno in [0, libc::EINVAL] {
        let window = server.recv().expect("a window");
        match errno {
            0 => server.reply(&window, &[], &[]),
            _ => server.refuse(&window, errno.unsigned_abs()),
        }
    }
    bed.daemon
        .wait_for("the refusal", || device()["windows_missing"] == 1);
    assert_eq!(figures(device()), [2, 1, 1, 3]);
    let text = ctl::render(&Question::Status, &bed.daemon.status());
    let line =
        "0000:00:06.0  1 windows are missing at the server, which takes 1; 3 were refused so far";
    assert!(text.contains(line), "{text}");
    let kept = "may still map guest memory";
    assert!(!text.contains(kept), "{text}");
    let mut status = bed.daemon.status();
    let device = &mut status["emulated"][0];
    assert_eq!(
        (&device["keeps_memory"], &device["kept_slots"]),
        (&false.into(), &0.into())
    );
    device["keeps_memory"] = true.into();
    device["kept_slots"] = 2.into();
    let text = ctl::render(&Question::Status, &status);
    let line = "may still map guest memory; 2 memory slots were removed meanwhile";
    assert!(text.contains(line), "{text}");
}

#[test]
fn a_fault_while_memory_slots_change_does_not_deadlock() {
    let bed = DaemonBed::new("messages");
    let (_client, scripted) = bed.pair(|server, msg| {
        if msg.cmd == DMA_UNMAP && msg.u64_at(8) == IOVA {
            // The device has locked the event queue now, and this fault goes there.
            let reply = server.call(DMA_READ, &dma(0x1234_0000, 4, &[]), &[]);
            assert_eq!(reply.errno(), libc::EFAULT);
        }
        false
    });
    let mut guest = Guest::boot_with(&bed.daemon, Setup::default());
    guest.post_event_buffer(24);
    assert_eq!(guest.attach(1, EP), 0);
    let gpa = 0x8_0000_0000;
    guest.add_region(crate::common::memory::Region::new(gpa, 0x1000));
    assert_eq!(guest.map_page(1, IOVA, gpa), 0);
    eventually("a window", || scripted.windows().contains(&IOVA));
    guest.remove_region(gpa);
    assert!(scripted.windows().is_empty());
    assert!(guest.take_event(SOON).is_some());
    // A deadlock ends when the daemon cuts the server off.
    assert!(
        !bed.daemon.log().contains("cut off"),
        "{}",
        bed.daemon.log()
    );
}

#[test]
fn a_server_that_does_not_read_cannot_exhaust_descriptors() {
    let bed = DaemonBed::new("messages");
    let (client, _server) = bed.raw_pair();
    let before = bed.daemon.fd_count();
    // The server neither reads nor answers these.
    let event = event();
    let body = irqs(0x24, 2, 0, 1);
    let message = bytes(0, SET_IRQS, NO_REPLY, 0, &body);
    client.stream.set_nonblocking(true).expect("set");
    let mut refused_in_a_row = 0;
    bed.daemon.wait_for("the limit", || {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&event);
        while client.stream.send_with_fds(&[&message[..]], &[fd]).is_ok() {
            refused_in_a_row = 0;
        }
        // The daemon takes no more, and the socket holds no more.
        refused_in_a_row += 1;
        refused_in_a_row >= 60 && bed.daemon.fd_count() - before >= 200
    });
    let more = bed.daemon.fd_count() - before;
    assert!(more < 400, "{more} more descriptors");
}

#[test]
fn dead_clients_and_servers_leave_no_descriptors_and_no_threads() {
    let bed = DaemonBed::new("mappings");
    let mut guest = Guest::boot_with(&bed.daemon, Setup::default());
    assert_eq!(guest.attach(1, EP), 0);
    assert_eq!(guest.map_page(1, IOVA, PAGE), 0);
    let round = |n: usize| {
        let (mut client, mut server) = bed.raw_pair();
        // The window has a descriptor.
        assert_eq!(server.recv().expect("a window").fds.len(), 1);
        match n % 3 {
            0 => drop(server),
            1 => drop(client),
            _ => {
                client.send_raw(&[0xff; 40], &[]);
                assert!(client.is_closed());
            }
        }
    };
    round(0);
    round(1);
    let counts = || (bed.daemon.fd_count(), bed.daemon.thread_count());
    let mut before = (0, 0);
    bed.daemon.wait_for("quiet", || {
        std::mem::replace(&mut before, counts()) == before
    });
    for n in 0..200 {
        round(n);
    }
    bed.daemon
        .wait_for("the daemon releases descriptors and threads", || {
            counts() <= before
        });
    assert_eq!(guest.unmap(1, IOVA, IOVA + 0xfff), 0);
}

#[test]
fn the_daemon_removes_its_socket_at_its_end() {
    let bed = DaemonBed::new("messages");
    bed.daemon.wait_for("a socket", || bed.client_path.exists());
    bed.daemon.terminate();
    bed.daemon.wait_for_end();
    assert!(!bed.client_path.exists());
}

/// Only a VMM that needs the IOMMU itself over vfio-user may have a client that takes no refusal for an answer.
#[test]
fn the_transport_decides_whether_every_access_is_answered() {
    for (start, errno) in [
        (Daemon::with_config as fn(&str) -> Daemon, libc::EIO),
        (Daemon::over_vfio_user, 0),
    ] {
        let bed = DaemonBed::with(start, "messages");
        let (mut client, server) = bed.raw_pair();
        drop(server);
        let access = region(0x10, 0, 4, &[]);
        let read = client.call(REGION_READ, &access, &[]);
        let data = [&access[..], &[0xff; 4]].concat();
        let expected = if errno == 0 { data } else { Vec::new() };
        assert_eq!((read.errno(), read.body), (errno, expected));
    }
}

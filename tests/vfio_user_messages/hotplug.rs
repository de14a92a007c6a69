//! Emulated devices that are added to a running VM, and removed.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::bed::{CLIENT_TEXT, ScriptedServer, eventually, start_scripted_server};
use crate::common::daemon::{Daemon, EP};
use crate::common::guest::{Guest, Setup};
use crate::connection::{Connection, VERSION, version_body};

const IOVA: u64 = 0x7000_0000;
const PAGE: u64 = 0xa0_0000;
const NOENT: u8 = 6;

const CONFIG: &str = "address = '00:05.0'\nbypass = false\nhotplug = ['00:06.0']\n\
                      [[endpoint]]\naddress = '00:07.0'\n";

fn add(daemon: &Daemon, client: &Path, server: &Path) {
    let answer = daemon.control(&format!(
        "add-endpoint address = '00:06.0', \
         vfio-user = {{ listen = {client:?}, connect = {server:?}, deadline-ms = 5000 }}"
    ));
    assert!(answer["error"].is_null(), "{answer}");
}

fn pair(client: &Path, listener: &UnixListener) -> (Connection, ScriptedServer) {
    let scripted = start_scripted_server(listener.try_clone().expect("cloned"), |_, _| false);
    let mut client = Connection::new(UnixStream::connect(client).expect("connected"));
    let answer = client.call(VERSION, &version_body(CLIENT_TEXT), &[]);
    assert_eq!(answer.errno(), 0);
    (client, scripted)
}

#[test]
fn an_added_emulated_device_reaches_mapped_memory_until_it_is_removed() {
    let daemon = Daemon::with_config(CONFIG);
    // In the directory of the daemon's other sockets.
    let client_path = daemon.socket().with_file_name("client");
    let server_path = daemon.socket().with_file_name("server");
    let listener = UnixListener::bind(&server_path).expect("a socket");
    let mut guest = Guest::boot_with(&daemon, Setup::default());
    // The domain has a mapping and the VMM has sent its memory before there is a backend.
    assert_eq!(guest.attach(1, 0x38), 0);
    assert_eq!(guest.map_page(1, IOVA, PAGE), 0);
    let (threads, descriptors) = (daemon.thread_count(), daemon.fd_count());

    for _ in 0..3 {
        add(&daemon, &client_path, &server_path);
        let (mut client, scripted) = pair(&client_path, &listener);
        assert_eq!(guest.attach(1, EP), 0);
        assert_eq!(guest.map_page(1, IOVA + 0x1000, PAGE + 0x1000), 0);
        // One region that has both mappings.
        assert_eq!(scripted.windows(), [0]);
        assert_eq!(daemon.status()["emulated"][0]["windows"], 1);

        let answer = daemon.control("remove-endpoint 00:06.0");
        assert!(answer["error"].is_null(), "{answer}");
        assert_eq!(daemon.status()["emulated"], serde_json::json!([]));
        assert_eq!(guest.attach(1, EP), NOENT);
        assert!(
            client.recv().is_none(),
            "the daemon closes the client's connection"
        );
        eventually("the server's connection ends", || {
            scripted.thread.is_finished()
        });
        assert!(!client_path.exists(), "the socket's file is gone");
        assert_eq!(guest.unmap(1, IOVA + 0x1000, IOVA + 0x1fff), 0);
    }
    // One thread stays: it reports faults to the guest, also those of later devices.
    eventually("the daemon releases threads and descriptors", || {
        (daemon.thread_count(), daemon.fd_count()) == (threads + 1, descriptors)
    });
}

/// The thread that takes commands may be taken over by a client, and must not reach the sockets of other services.
#[test]
fn an_added_device_reaches_only_servers_beside_the_daemon_s_sockets() {
    let daemon = Daemon::with_config(CONFIG);
    let listen = daemon.socket().with_file_name("client");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let server = elsewhere.path().join("server");
    let listener = UnixListener::bind(&server).expect("a socket");
    let own = daemon.socket().parent().expect("a folder").to_owned();
    let name = elsewhere.path().file_name().expect("a name");
    let around = own.join("..").join(name).join("server");
    for path in [&server, &around] {
        let answer = daemon.control(&format!(
            "add-endpoint address = '00:06.0', vfio-user = {{ listen = {listen:?}, connect = {path:?} }}"
        ));
        let error = answer["error"].as_str().expect("a refusal");
        assert!(error.contains("out of the daemon's reach"), "{error}");
        assert!(!listen.exists(), "nothing has changed");
    }
    // A link beside the sockets is found out when the daemon connects.
    let link = own.join("link");
    std::os::unix::fs::symlink(&server, &link).expect("a link");
    add(&daemon, &listen, &link);
    let mut client = Connection::new(UnixStream::connect(&listen).expect("connected"));
    client.ask(VERSION, &version_body(CLIENT_TEXT), &[]);
    daemon.wait_for("a refusal", || {
        daemon.log().contains("it is a symbolic link")
    });
    listener.set_nonblocking(true).expect("set");
    let accepted = listener.accept().map(drop);
    assert_eq!(
        accepted.expect_err("nobody has connected").kind(),
        std::io::ErrorKind::WouldBlock
    );
}

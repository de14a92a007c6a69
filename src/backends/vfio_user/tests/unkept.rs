//! The operator learns of connections that the next process cannot go on with.

use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{Deadlines, EmulatedDevice, Isolation, KeptDevice, start_kept};
use super::taken_over::NoFaults;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::vfio_user::testing::ENDPOINT;

/// The keeper has room for the memory of the device, and for no socket.
#[test]
fn a_life_is_not_kept_while_a_client_is_not() {
    let (_manager, ours) = UnixDatagram::pair().expect("sockets");
    let keeper = Keeper::new(ours, []).expect("a keeper").with_room(4);
    let keeper = Arc::new(keeper);
    let life = Arc::new(Life::new(true).with_connections(keeper.unkept().clone()));
    let kept = KeptDevice::open(&keeper, &life, ENDPOINT, "device", false).expect("room");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("client");
    let device = EmulatedDevice {
        endpoint: ENDPOINT,
        name: "device".into(),
        server: folder.path().join("server"),
        isolation: Isolation::Messages,
        max_windows: 64,
        reserved: Vec::new(),
        deadlines: Deadlines::with_answer(Duration::from_secs(1)),
        answers_all_accesses: false,
    };
    let listener = UnixListener::bind(&path).expect("a socket");
    let (_backend, watch) =
        start_kept(device, listener, Arc::new(NoFaults), Some(kept)).expect("a backend");
    let eventually = |what: &str, holds: &dyn Fn() -> bool| {
        let until = Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    for _ in 0..2 {
        assert!(life.is_kept(), "nobody is connected");
        let client = UnixStream::connect(&path).expect("connected");
        eventually("a client", &|| watch.state().ends.client);
        assert!(!life.is_kept());
        drop(client);
        eventually("its end", &|| !watch.state().ends.client);
        eventually("nothing is unkept", &|| life.is_kept());
    }
}

//! A server that behaves as libvfio-user does, in the points in which a server can surprise the interposer: a limit of
//! regions that it does not announce and answers with EINVAL, a device that pauses before each change of its regions,
//! refusals with bodies, a twin socket, exact unmaps. `docs/vfio-user-servers.md` says where the facts come from.

mod device;
mod regions;
mod rows;
mod slow;

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use self::regions::Regions;
use crate::connection::{
    Connection, DMA_MAP, DMA_UNMAP, Msg, NO_REPLY, REGION_READ, REGION_WRITE, RESET, SET_IRQS,
    VERSION, version_body,
};

/// An offset of the device's region 0 that the device refuses to access.
pub const UNSERVED: u64 = 0xffc;
/// Bytes of each region.
const REGION_LEN: u64 = 0x1000;
/// The number of regions.
const REGIONS: u32 = 9;

/// How a version of the library, and the device in it, behave.
#[derive(Clone, Copy, Debug)]
pub struct Version {
    /// The number of DMA regions that it takes.
    pub max_regions: usize,
    /// The number of regions that its process can map: a little less than `vm.max_map_count`.
    pub max_mapped: usize,
    /// How long the device takes to pause, before the answer to DMA_MAP, DMA_UNMAP and RESET.
    pub pause: Duration,
    /// Whether it has a socket for its commands, if the client offers one.
    pub twin_socket: bool,
    /// What it does with a DMA_UNMAP of all regions.
    pub unmap_all: UnmapAll,
    /// Its answer to a DMA_UNMAP of a region that it does not have. The library refuses with ENOENT.
    pub unknown: Result<(), i32>,
}

/// What a server does with a DMA_UNMAP of all regions. The library removes them, in all versions since 2021-08.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnmapAll {
    Removes,
    Refuses(i32),
    /// Removes nothing, and answers with success.
    Ignores,
    /// Removes the lower half, and answers with success.
    RemovesHalf,
    /// Removes nothing, answers with success, and refuses all that follows with this errno.
    Hangs(i32),
}

impl Version {
    /// Until 2023-09.
    pub const OF_2021: Self = Self {
        max_regions: 16,
        max_mapped: 65_500,
        pause: Duration::ZERO,
        twin_socket: false,
        unmap_all: UnmapAll::Removes,
        unknown: Err(libc::ENOENT),
    };
    /// From 2024-05 to 2026-03.
    pub const OF_2025: Self = Self {
        max_regions: 64,
        twin_socket: true,
        ..Self::OF_2021
    };
    /// Since 2026-03.
    pub const OF_2026: Self = Self {
        max_regions: 1_000_000,
        ..Self::OF_2025
    };
}

/// A running server. It serves one connection after the other.
pub struct Library {
    state: Arc<Mutex<State>>,
}

/// What a server has.
#[derive(Default)]
pub struct State {
    /// The DMA regions of the present connection.
    pub regions: Regions,
    /// The number of connections so far.
    pub connections: usize,
    /// The number of changes for which the device has paused.
    pub pauses: usize,
    /// The number of DMA_MAP that it has refused.
    pub refused: usize,
    /// The number of DMA_UNMAP that it has got.
    pub unmaps: usize,
    /// The socket for the server's commands.
    twin: Option<Connection>,
    /// The present connection.
    stream: Option<UnixStream>,
}

impl Library {
    /// Starts a server that listens at `listener`.
    pub fn start(listener: UnixListener, version: Version) -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        // It ends with the test.
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                shared.lock().unwrap().stream = stream.try_clone().ok();
                serve(Connection::new(stream), version, &shared);
                let mut state = shared.lock().unwrap();
                state.regions = Regions::default();
                state.twin = None;
                // The interposer waits until no copy of the socket is open.
                state.stream = None;
            }
        });
        Self { state }
    }

    /// The server's state. The server answers nothing while the guard lives.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The server dies, and the next connection is that of its successor.
    pub fn restart(&self) {
        let stream = self.state().stream.take().expect("a connection");
        stream.shutdown(Shutdown::Both).expect("connected");
    }

    /// The first addresses and the lengths of the regions, in ascending order.
    pub fn windows(&self) -> Vec<(u64, u64)> {
        self.state().regions.ranges()
    }
}

/// Serves one connection.
fn serve(mut client: Connection, version: Version, shared: &Mutex<State>) {
    shared.lock().unwrap().connections += 1;
    while let Some(msg) = client.recv() {
        if [DMA_MAP, DMA_UNMAP, RESET].contains(&msg.cmd) {
            // The device pauses. Nothing else is served meanwhile.
            std::thread::sleep(version.pause);
        }
        let mut state = shared.lock().unwrap();
        let answer = match msg.cmd {
            VERSION => {
                state.twin = negotiate(&mut client, version, &msg);
                continue;
            }
            DMA_MAP | DMA_UNMAP => state.change_regions(version, &msg),
            RESET => {
                state.pauses += 1;
                Ok(Vec::new())
            }
            SET_IRQS => Ok(Vec::new()),
            REGION_READ | REGION_WRITE => access(&msg),
            _ => Err((libc::EINVAL, Vec::new())),
        };
        // The answer goes out before anybody sees the new state.
        if msg.flags & NO_REPLY == 0 {
            match answer {
                Ok(body) => client.reply(&msg, &body, &[]),
                Err((errno, body)) => client.refuse_with(&msg, errno.unsigned_abs(), &body),
            }
        }
    }
}

/// Answers VERSION. Returns the socket for the server's commands.
fn negotiate(client: &mut Connection, version: Version, msg: &Msg) -> Option<Connection> {
    let offered = msg.text()["capabilities"]["twin_socket"]["supported"] == true;
    if !(offered && version.twin_socket) {
        let text = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#;
        client.reply(msg, &version_body(text), &[]);
        return None;
    }
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let text = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,
        "twin_socket":{"supported":true,"fd_index":0}}}"#;
    client.reply(msg, &version_body(text), &[theirs.as_fd()]);
    Some(Connection::new(ours))
}

/// The body of a reply; or an errno, and the body that comes with it.
type Answer = Result<Vec<u8>, (i32, Vec<u8>)>;

impl State {
    fn change_regions(&mut self, version: Version, msg: &Msg) -> Answer {
        self.pauses += 1;
        if msg.cmd == DMA_MAP {
            let added = self.regions.add(version, msg);
            self.refused += usize::from(added.is_err());
            return added
                .map(|()| Vec::new())
                .map_err(|errno| (errno, Vec::new()));
        }
        self.unmaps += 1;
        let removed = self.regions.remove(version, msg);
        // The refusal has the reply that was prepared.
        removed
            .map(|()| msg.body[..24].to_vec())
            .map_err(|errno| (errno, msg.body[..24].to_vec()))
    }
}

/// Accesses a region of the device.
fn access(msg: &Msg) -> Answer {
    let (offset, region, count) = (msg.u64_at(0), msg.u32_at(8), msg.u32_at(12));
    if region >= REGIONS || offset.saturating_add(count.into()) > REGION_LEN {
        return Err((libc::EINVAL, Vec::new()));
    }
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut body = msg.body[..16].to_vec();
    if msg.cmd == REGION_READ {
        body.resize(16 + count as usize, 0);
    }
    if offset == UNSERVED {
        return Err((libc::EINVAL, body));
    }
    Ok(body)
}

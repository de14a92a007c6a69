//! What an earlier process has left of one device, as tests want it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::{Book, KeptCommand, KeptDevice, KeptTerms, Leg, Peer, WindowsOf};
use crate::ids::EndpointId;
use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::vfio_user::message::{Command, Header};
use crate::vfio_user::socket::{Outbox, OutgoingFd, Received, Receiver, send_with_descriptors};
use crate::vfio_user::version::{Terms, Version};

/// The device.
pub(crate) const ENDPOINT: EndpointId = EndpointId(48);

/// What the record says. The default is a server that is told everything, and has answered.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    /// The server was sent all windows.
    pub(crate) is_announced: bool,
    /// It has answered all updates.
    pub(crate) is_settled: bool,
    /// See [`WindowsOf`].
    pub(crate) windows_of: u64,
    /// The server has descriptors of memory.
    pub(crate) shares_memory: bool,
    /// The server has a second socket.
    pub(crate) has_twin: bool,
    /// The client has descriptors of the server.
    pub(crate) client_holds_descriptors: bool,
    /// The client has set interrupts.
    pub(crate) client_has_interrupts: bool,
    /// A message with descriptors was not sent to the client.
    pub(crate) has_unsent_descriptors: bool,
    /// The client's commands without a reply.
    pub(crate) commands: Vec<Header>,
    /// What was received from the client, and from the server, and was not handled. A descriptor came with each.
    pub(crate) from_client: Vec<u8>,
    pub(crate) from_server: Vec<u8>,
}

impl Default for Left {
    fn default() -> Self {
        Self {
            is_announced: true,
            is_settled: true,
            windows_of: 1,
            shares_memory: true,
            has_twin: false,
            client_holds_descriptors: false,
            client_has_interrupts: false,
            has_unsent_descriptors: false,
            commands: Vec::new(),
            from_client: Vec::new(),
            from_server: Vec::new(),
        }
    }
}

/// The other ends of the sockets.
#[derive(Debug)]
pub(crate) struct LeftPeers {
    pub(crate) client: UnixStream,
    pub(crate) server: UnixStream,
    pub(crate) twin: UnixStream,
}

impl Left {
    /// Has `keeper` keep all of it, as a process does that dies then.
    pub(crate) fn keep_with(&self, keeper: &Arc<Keeper>) -> LeftPeers {
        let life = Arc::new(Life::new(true));
        let device = KeptDevice::open(keeper, &life, ENDPOINT, "device", false);
        let KeptDevice {
            connections,
            mut book,
            ..
        } = device.expect("room");
        let connect = |leg: Leg, unhandled: &[u8]| {
            let (ours, theirs) = UnixStream::pair().expect("sockets");
            let cookie = connections.keep(leg, ours.as_fd()).expect("kept");
            let (input, ring) = connections.begin(leg, ours.as_fd()).expect("memory");
            let (mut receiver, _outbox) = (Receiver::kept(input, false), Outbox::from(ring));
            if !unhandled.is_empty() {
                let file = OutgoingFd::Owned(ours.try_clone().expect("a copy").into());
                send_with_descriptors(theirs.as_fd(), unhandled, &[file]).expect("sent");
                let received = receiver.receive(&ours).expect("a message");
                assert!(matches!(received, Received::Message(_)));
            }
            (theirs, Peer::Connected(cookie))
        };
        let (client, client_is) = connect(Leg::Client, &self.from_client);
        let (server, server_is) = connect(Leg::Server, &self.from_server);
        let (twin, twin_is) = connect(Leg::Twin, &[]);
        if !self.has_twin {
            connections.release(Leg::Twin);
        }
        self.record(&mut book, [client_is, server_is, twin_is]);
        LeftPeers {
            client,
            server,
            twin,
        }
    }

    fn record(&self, book: &mut Book, [client, server, twin]: [Peer; 3]) {
        let terms = Terms {
            server_descriptors: 8,
            client_descriptors: 8,
            server_data: 4096,
            windows: 64,
            twin: self.has_twin.then_some(0),
        };
        let terms = KeptTerms {
            version: Version::default(),
            answer: Version::default(),
            terms,
        };
        book.set_terms(&terms).expect("short");
        // The numbers that the server knows are those after 7.
        for (id, header) in (7..).zip(&self.commands) {
            let command = KeptCommand {
                id,
                header: *header,
                accesses_nothing: false,
                body: vec![0; 16],
            };
            book.add_command(&command).expect("room");
        }
        let now = &mut book.now;
        now.client.peer = client;
        now.client.descriptors_end = u64::from(self.has_unsent_descriptors);
        now.server.peer = server;
        now.twin.peer = if self.has_twin { twin } else { Peer::None };
        now.next_id = 100;
        now.client_holds_descriptors = self.client_holds_descriptors;
        now.client_has_interrupts = self.client_has_interrupts;
        now.shares_memory = self.shares_memory;
        now.is_announced = self.is_announced;
        now.is_settled = self.is_settled;
        now.windows_of = WindowsOf(self.windows_of);
        book.commit();
    }
}

/// The number of the client's commands without a reply that the record has.
pub(crate) fn commands_of(device: &KeptDevice) -> usize {
    let left = device.left.as_ref();
    left.map_or(0, |left| left.recorded.commands.len())
}

/// What is left of the client's socket.
pub(crate) fn client_of(device: &KeptDevice) -> String {
    format!("{:?}", device.left.as_ref().map(|left| &left.client))
}

/// A command of the client, as the record has it.
pub(crate) fn command(id: u16) -> Header {
    Header::command(id, Command::RegionRead, 16)
}

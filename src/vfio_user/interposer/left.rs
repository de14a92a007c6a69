//! Going on with the client and the server that an earlier process has left.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use log::info;

use super::peers::{Buffers, ClientLeg, ServerLeg, Stage, Twin};
use super::proxy::Proxy;
use super::unclaimed::FixedReplies;
use crate::vfio_user::client_windows::ClientWindows;
use crate::vfio_user::irq_replay::IrqReplay;
use crate::vfio_user::kept::{
    KeptConnections, KeptDevice, LeftConnections, LeftSocket, Leg, Peer, Recorded,
};
use crate::vfio_user::link::{ClientProgress, LeftServer};
use crate::vfio_user::message::{Command, Header};
use crate::vfio_user::socket::{Outbox, Receiver};

impl Proxy {
    /// Has the connections kept from now on, and goes on with those that an earlier process has left.
    pub(super) fn keep(&mut self, device: KeptDevice) {
        self.link.keep(device.book, device.connections.clone());
        self.kept = Some(device.connections.clone());
        let Some(left) = device.left else { return };
        if device.waits_for_target {
            self.link.hold();
        }
        self.take_over(&device.connections, left, device.waits_for_target);
    }

    fn take_over(&mut self, kept: &KeptConnections, left: LeftConnections, goes_on: bool) {
        let LeftConnections {
            recorded,
            client,
            server,
            twin,
        } = left;
        let mut is_new = None;
        match client {
            LeftSocket::None | LeftSocket::Closing(_) => {}
            LeftSocket::Lost => kept.lose("the keeper has lost the client's connection"),
            LeftSocket::New(socket) if goes_on => is_new = Some(socket),
            LeftSocket::Connected(socket) if goes_on => {
                match self.resume_client(kept, &recorded, &socket) {
                    Ok(client) => self.client = Some(client),
                    Err(cause) => {
                        kept.lose(&format!("the client's connection ends: {cause}"));
                        self.end_left_client(kept, &socket);
                    }
                }
            }
            LeftSocket::New(socket) | LeftSocket::Connected(socket) => {
                kept.lose("the client's connection ends with the state of the daemon before");
                self.end_left_client(kept, &socket);
            }
        }
        if self.client.is_none() && recorded.positions.client.peer.connected().is_some() {
            // Whatever became of it, it is gone.
            self.link.end_with_client();
        }
        self.link.set_client(self.client.is_some());
        let is_resumed = self.take_over_server(kept, &recorded, server, twin);
        if let Some(socket) = is_new
            && let Ok(socket) = socket.try_clone()
        {
            // Nothing was received from it. The keeper has it under the same name.
            self.welcome(UnixStream::from(socket));
        }
        if !is_resumed {
            let unanswered: Vec<Header> = recorded.commands.iter().map(|(_, c)| c.header).collect();
            // Also a client whose server was connecting again.
            if recorded.terms.is_some() && self.client.is_some() {
                self.refuse_all(&unanswered);
            }
        }
    }

    fn end_left_client(&self, kept: &KeptConnections, socket: &OwnedFd) {
        self.link.end_with_client();
        kept.end(Leg::Client, socket.as_fd());
    }

    /// Goes on with a server. Returns false if there is none to go on with.
    fn take_over_server(
        &mut self,
        kept: &KeptConnections,
        recorded: &Recorded,
        server: LeftSocket,
        twin: LeftSocket,
    ) -> bool {
        let socket = match server {
            LeftSocket::Connected(socket) => socket,
            LeftSocket::Closing(socket) => {
                self.end_left_twin(kept, twin);
                self.link.close(socket);
                return false;
            }
            LeftSocket::New(socket) => {
                // It had not negotiated, so it has nothing.
                self.end_left_twin(kept, twin);
                kept.end(Leg::Server, socket.as_fd());
                return false;
            }
            LeftSocket::Lost => {
                kept.lose("the keeper has lost the server's connection");
                self.end_left_twin(kept, twin);
                self.link.forget();
                return false;
            }
            LeftSocket::None => {
                self.end_left_twin(kept, twin);
                return false;
            }
        };
        match self.resume_server(kept, recorded, &socket, &twin) {
            Ok(server) => {
                info!(
                    "{}: goes on with its client and its server",
                    self.settings.name
                );
                self.server = Some(server);
                true
            }
            Err(cause) => {
                kept.lose(&format!("the server's connection ends: {cause}"));
                self.end_left_twin(kept, twin);
                if recorded.positions.shares_memory {
                    self.link.close(socket);
                } else {
                    self.link.forget();
                    kept.end(Leg::Server, socket.as_fd());
                }
                false
            }
        }
    }

    fn end_left_twin(&self, kept: &KeptConnections, twin: LeftSocket) {
        if let LeftSocket::Connected(socket)
        | LeftSocket::Closing(socket)
        | LeftSocket::New(socket) = twin
        {
            kept.end(Leg::Twin, socket.as_fd());
        }
    }

    fn resume_client(
        &self,
        kept: &KeptConnections,
        recorded: &Recorded,
        socket: &OwnedFd,
    ) -> io::Result<ClientLeg> {
        let (input, ring) = kept.resume(Leg::Client, recorded, socket.as_fd())?;
        let positions = &recorded.positions;
        let buffers = Buffers {
            receiver: Receiver::kept(input, false),
            outbox: Outbox::from(ring),
            kept: positions.client.peer.connected(),
            unkept: None,
        };
        let socket = UnixStream::from(socket.try_clone()?);
        let takes_no_refusal = self.settings.answers_all_accesses;
        let mut client = ClientLeg::new(socket, buffers, takes_no_refusal);
        client.windows = ClientWindows::unknown();
        client.holds_descriptors = positions.client_holds_descriptors;
        if positions.client_has_interrupts {
            client.irqs = IrqReplay::lost();
        }
        if let Some(terms) = &recorded.terms {
            client.stage = Stage::Negotiated {
                version: terms.version.clone(),
                answer: Box::new(terms.answer.clone()),
                terms: terms.terms.clone(),
            };
        }
        if let Some(fixed) = &mut client.fixed {
            record_all(fixed, recorded);
        }
        client.recorded = Some(ClientProgress {
            handled: positions.client.handled,
            committed: positions.client.committed,
            descriptors_end: positions.client.descriptors_end,
            holds_descriptors: positions.client_holds_descriptors,
            has_interrupts: positions.client_has_interrupts,
        });
        Ok(client)
    }

    fn resume_server(
        &self,
        kept: &KeptConnections,
        recorded: &Recorded,
        socket: &Arc<OwnedFd>,
        twin: &LeftSocket,
    ) -> io::Result<ServerLeg> {
        let positions = &recorded.positions;
        let refused = |why: &str| Err(io::Error::other(why.to_owned()));
        let (Some(_), Some(terms)) = (&self.client, &recorded.terms) else {
            return refused("its client is gone");
        };
        if !positions.is_announced {
            return refused("the daemon died while it told the server all windows");
        }
        let twin = match (positions.twin.peer, twin) {
            (Peer::Connected(_), LeftSocket::Connected(socket)) => {
                let (input, ring) = kept.resume(Leg::Twin, recorded, socket.as_fd())?;
                self.link.set_twin(socket.clone());
                Some(Twin {
                    socket: socket.clone(),
                    receiver: Receiver::kept(input, true),
                    outbox: Outbox::from(ring),
                    handled: positions.twin.handled,
                    recorded: positions.twin.handled,
                })
            }
            (Peer::Connected(_), _) => return refused("its second socket was lost"),
            _ => None,
        };
        let (input, ring) = kept.resume(Leg::Server, recorded, socket.as_fd())?;
        let left = LeftServer {
            socket: socket.clone(),
            outbox: Outbox::from(ring),
            terms: terms.terms.clone(),
        };
        Ok(ServerLeg {
            session: self.link.resume(left, recorded),
            socket: socket.clone(),
            receiver: Receiver::kept(input, true),
            handled: positions.server.handled,
            recorded: positions.server.handled,
            kept: positions.server.peer.connected(),
            twin,
        })
    }
}

/// Notes the commands without a reply.
fn record_all(fixed: &mut FixedReplies, recorded: &Recorded) {
    for (_, command) in &recorded.commands {
        if let Some(number) = Command::from_number(command.header.command) {
            fixed.record(&command.header, number, &command.body);
        }
    }
}

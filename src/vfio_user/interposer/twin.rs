//! The server's second socket, for its commands.

use std::io;
use std::os::fd::AsFd;

use super::peers::{MAX_UNSENT, MESSAGES_PER_TURN};
use super::proxy::Proxy;
use super::server::Leg;
use crate::info_limited;
use crate::process::event_loop::Events;
use crate::vfio_user::kept::Leg as KeptLeg;
use crate::vfio_user::message::Kind;
use crate::vfio_user::socket::{Received, Receiver};

impl Proxy {
    pub(super) fn twin_ready(&mut self, events: Events) {
        let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
            return;
        };
        let mut receiver = std::mem::take(&mut twin.receiver);
        self.receive_from_twin(&mut receiver, events);
        self.replies.clear();
        if let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) {
            twin.receiver = receiver;
        }
    }

    fn receive_from_twin(&mut self, receiver: &mut Receiver, events: Events) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
                return;
            };
            if let Err(cause) = twin.outbox.flush(&twin.socket) {
                return self.twin_failed(&cause);
            }
            if twin.outbox.len_bytes() >= MAX_UNSENT {
                if events.intersects(Events::EPOLLHUP | Events::EPOLLERR) {
                    self.drop_twin();
                }
                return;
            }
            let outcome = match receiver.receive_in_place(&twin.socket) {
                Ok(Received::Message(message)) => {
                    let end = message.end;
                    let outcome = if matches!(message.header.kind, Kind::Command { .. }) {
                        self.execute(&message, Leg::Twin)
                    } else {
                        Err("it sent a reply on the socket for its commands".into())
                    };
                    if let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) {
                        twin.handled = end;
                    }
                    outcome
                }
                Ok(Received::Nothing) => return,
                Ok(Received::End) => return self.drop_twin(),
                Err(cause) => Err(cause.to_string()),
            };
            if let Err(why) = outcome {
                return self.cut_server_off(&why);
            }
            if self.replies.is_enough() || !receiver.has_message() {
                self.send_twin_replies();
                self.note_twin(receiver);
            }
        }
        self.send_twin_replies();
        self.note_twin(receiver);
    }

    /// The commands so far are recorded.
    fn note_twin(&self, receiver: &mut Receiver) {
        if let Some(twin) = self.server.as_ref().and_then(|s| s.twin.as_ref()) {
            receiver.set_handled(twin.recorded);
        }
    }

    fn send_twin_replies(&mut self) {
        let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
            return;
        };
        if self.replies.is_empty() && twin.handled == twin.recorded {
            return;
        }
        let sent = self.replies.send(&mut twin.outbox, &twin.socket);
        let handled = twin.handled;
        let sent = sent.and_then(|()| self.commit_twin(handled));
        if let Err(cause) = sent {
            self.twin_failed(&cause);
        }
    }

    /// Makes everything count that was done for commands on the second socket, up to this stream position, and sends the
    /// replies. Does nothing if the connection ends with this process.
    pub(super) fn commit_twin(&mut self, handled: u64) -> io::Result<()> {
        let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
            return Ok(());
        };
        let Some(ring) = twin.outbox.ring() else {
            return Ok(());
        };
        let tail = ring.tail();
        self.link.commit_twin(handled, tail);
        twin.recorded = handled;
        ring.commit(tail);
        twin.outbox.flush(&twin.socket)
    }

    /// The socket for the server's commands accepts no more replies.
    pub(super) fn twin_failed(&mut self, cause: &io::Error) {
        match cause.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => self.drop_twin(),
            _ => self.cut_server_off(&cause.to_string()),
        }
    }

    /// The server has closed the socket for its commands. A server that ends closes one socket after the other, and only
    /// the end of the other one says that it has released the guest's memory.
    fn drop_twin(&mut self) {
        let twin = self.server.as_mut().and_then(|server| server.twin.take());
        if let (Some(twin), Some(kept)) = (twin, &self.kept) {
            self.link.commit_end_of_twin();
            kept.end(KeptLeg::Twin, twin.socket.as_fd());
        }
        info_limited!(
            "{}: the server has closed the socket for its commands",
            self.settings.name
        );
    }
}

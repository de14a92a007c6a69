//! The server's second socket, for its commands.

use std::io;

use super::peers::{MAX_UNSENT, MESSAGES_PER_TURN};
use super::proxy::Proxy;
use super::server::Leg;
use crate::info_limited;
use crate::process::event_loop::Events;
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
                    if matches!(message.header.kind, Kind::Command { .. }) {
                        self.execute(&message, Leg::Twin)
                    } else {
                        Err("it sent a reply on the socket for its commands".into())
                    }
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
            }
        }
        self.send_twin_replies();
    }

    fn send_twin_replies(&mut self) {
        let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
            return;
        };
        if let Err(cause) = self.replies.send(&mut twin.outbox, &twin.socket) {
            self.twin_failed(&cause);
        }
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
        if let Some(server) = &mut self.server {
            server.twin = None;
        }
        info_limited!(
            "{}: the server has closed the socket for its commands",
            self.settings.name
        );
    }
}

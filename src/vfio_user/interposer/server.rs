//! The server's messages: replies go to the client, commands are executed here.

use std::borrow::Cow;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::peers::{ClientLeg, MAX_UNSENT, MESSAGES_PER_TURN, Stage, Twin};
use super::proxy::{CutOffReason, Proxy};
use crate::process::event_loop::Events;
use crate::vfio_user::dma::{self, LargeRead};
use crate::vfio_user::kept::{KeptTerms, Leg as KeptLeg};
use crate::vfio_user::link::{KeptNegotiation, MatchedReply, ServerProgress};
use crate::vfio_user::message::{
    Command, Header, Kind, check_command, check_empty_reply, check_reply,
};
use crate::vfio_user::socket::{Message, OutgoingFd, Received, Receiver, is_stream_socket};
use crate::vfio_user::version::Version;
use crate::{info_limited, warn_limited};

/// The socket of the server on which a command has come.
#[derive(Clone, Copy, Debug)]
pub(super) enum Leg {
    /// The one with the replies to the client's commands.
    Main,
    /// The one for the server's commands only.
    Twin,
}

impl Proxy {
    pub(super) fn server_ready(&mut self, events: Events) {
        if events.contains(Events::EPOLLOUT) {
            self.link.flush();
        }
        let Some(server) = &mut self.server else {
            return;
        };
        let mut receiver = std::mem::take(&mut server.receiver);
        self.receive_from_server(&mut receiver, events);
        self.replies.clear();
        // It is gone if the server was cut off or has hung up.
        if let Some(server) = &mut self.server {
            server.receiver = receiver;
        }
    }

    /// Handles messages of the server. Sends the replies to those that were received at once together.
    fn receive_from_server(&mut self, receiver: &mut Receiver, events: Events) {
        for _ in 0..MESSAGES_PER_TURN {
            let status = self.link.status();
            let Some(server) = &self.server else {
                return;
            };
            if !status.connected || status.session != server.session {
                return self.drop_server();
            }
            // The client's commands do not count: a server that reads nothing while it sends would wait for ever.
            if status.reply_bytes >= MAX_UNSENT {
                if events.intersects(Events::EPOLLHUP | Events::EPOLLERR) {
                    self.link.end();
                }
                return;
            }
            receiver.set_handled(server.recorded);
            let outcome = match receiver.receive_in_place(&server.socket) {
                Ok(Received::Message(message)) => {
                    let end = message.end;
                    let outcome = self.handle_server_message(message);
                    if let Some(server) = &mut self.server {
                        server.handled = end;
                    }
                    outcome
                }
                Ok(Received::Nothing) => break,
                Ok(Received::End) => {
                    warn_limited!("{}: the server has hung up", self.settings.name);
                    self.link.end();
                    return self.drop_server();
                }
                Err(cause) => Err(cause.to_string()),
            };
            if let Err(why) = outcome {
                return self.cut_server_off(&why);
            }
            if self.replies.is_enough() || !receiver.has_message() {
                self.send_replies();
            }
        }
        self.send_replies();
        if let Some(server) = &self.server {
            receiver.set_handled(server.recorded);
        }
        self.flush_client();
    }

    /// Sends the replies, and makes everything count that was done for the server.
    fn send_replies(&mut self) {
        let Some(server) = &self.server else {
            return;
        };
        let handled = server.handled;
        let is_recorded = server.recorded == handled;
        if self.replies.is_empty() && is_recorded {
            return;
        }
        let progress = self.server_progress(handled);
        if self.replies.is_empty() {
            self.link.commit_server(&progress);
        } else {
            self.link.reply(&mut self.replies, &progress);
        }
        self.set_recorded(&progress);
    }

    /// How far the server's messages are handled, with everything that the client gets for them.
    fn server_progress(&mut self, handled: u64) -> ServerProgress {
        let client = self.client.as_mut().and_then(ClientLeg::progress);
        ServerProgress { handled, client }
    }

    fn set_recorded(&mut self, progress: &ServerProgress) {
        if let (Some(client), Some(recorded)) = (&mut self.client, progress.client) {
            client.set_recorded(recorded);
        }
        if let Some(server) = &mut self.server {
            server.recorded = progress.handled;
        }
    }

    fn handle_server_message(&mut self, message: Message<&[u8]>) -> Result<(), CutOffReason> {
        if matches!(message.header.kind, Kind::Command { .. }) {
            return self.execute(&message, Leg::Main);
        }
        if message.lost_descriptors && may_have_descriptors(&message.header) {
            let why =
                "the server's connection ends: the daemon died with the descriptors of its reply";
            return Err(self.lose(why));
        }
        let asked = match self.link.match_reply(&message.header) {
            MatchedReply::Own => return Ok(()),
            MatchedReply::Violation(why) => return Err(why.into()),
            MatchedReply::Version => return self.handle_version_reply(message),
            MatchedReply::Client(command) => command,
        };
        let client_header = asked.header;
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let have = message.descriptors.len();
        if let Err(why) = check_reply_to(&client_header, asked.accesses_nothing, &message) {
            // For the link, the command has its reply. So the end of the connection does not refuse it.
            client.refuse(&client_header, libc::EIO);
            return Err(why);
        }
        let takes = match &client.stage {
            Stage::Negotiated { terms, .. } => terms.client_descriptors,
            Stage::Connected(_) | Stage::Negotiating { .. } => 0,
        };
        if have > takes {
            // libvfio-user sends as many descriptors as the device has, whatever the client can receive.
            warn_limited!(
                "{}: the server's reply has {have} descriptors; the client can receive {takes} and gets E2BIG",
                self.settings.name
            );
            client.refuse(&client_header, libc::E2BIG);
            return Ok(());
        }
        client.holds_descriptors |= !message.descriptors.is_empty();
        let mut body = Cow::Borrowed(message.body);
        if let Some(fixed) = &mut client.fixed {
            if let Kind::Refusal(error) = message.header.kind {
                let error = i32::try_from(error).unwrap_or(libc::EIO);
                client.refuse(&client_header, error);
                return Ok(());
            }
            body = Cow::Owned(fixed.complete(client_header.id, body.into_owned()));
        }
        let reply = Header {
            id: client_header.id,
            ..message.header
        };
        let descriptors = message.descriptors.into_iter().map(OutgoingFd::Owned);
        client
            .outbox
            .push(reply.with_body(&body), descriptors.collect());
        Ok(())
    }

    /// Completes the negotiation after the server has replied to VERSION.
    fn handle_version_reply(&mut self, message: Message<&[u8]>) -> Result<(), CutOffReason> {
        let (Some(client), Some(server)) = (&mut self.client, &mut self.server) else {
            return Ok(());
        };
        let end = message.end;
        let proposed = match &client.stage {
            Stage::Connected(_) => return Ok(()),
            Stage::Negotiating { version, .. } | Stage::Negotiated { version, .. } => version,
        };
        let agreed = match message.header.kind {
            Kind::Refusal(error) => {
                self.pass_version_refusal(error);
                return Ok(());
            }
            Kind::Command { .. } | Kind::Reply => Version::decode(message.body)
                .and_then(|server| proposed.answer(&server, message.descriptors.len()))
                .map_err(|e| e.to_string())
                .and_then(|(answer, terms)| {
                    let twin = terms.twin.and_then(|at| message.descriptors.get(at));
                    match twin {
                        Some(twin) if !is_stream_socket(twin) => {
                            Err("its twin socket is not a Unix stream socket".into())
                        }
                        _ => Ok((answer, terms)),
                    }
                }),
        };
        let (answer, terms) = match agreed {
            Ok(agreed) => agreed,
            Err(why) => {
                self.end_client("its server cannot be negotiated with");
                return Err(why);
            }
        };
        let twin = terms.twin.and_then(|at| {
            let mut descriptors = message.descriptors;
            (at < descriptors.len()).then(|| descriptors.swap_remove(at))
        });
        let kept = server.kept;
        let mut kept_twin = None;
        if let Some(socket) = twin {
            let buffers = self.buffers(KeptLeg::Twin, socket.as_fd(), true);
            let buffers = buffers.map_err(|cause| cause.to_string())?;
            kept_twin = buffers.kept;
            let socket = Arc::new(socket);
            if buffers.kept.is_some() {
                self.link.set_twin(socket.clone());
            }
            if let Some(server) = &mut self.server {
                server.twin = Some(Twin {
                    socket,
                    receiver: buffers.receiver,
                    outbox: buffers.outbox,
                    handled: 0,
                    recorded: 0,
                });
            }
        }
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let max_fds = terms.server_descriptors;
        match &client.stage {
            Stage::Negotiated { answer: before, .. } if **before != answer => {
                self.end_client("its server has reconnected with other capabilities");
                return Ok(());
            }
            Stage::Negotiated { .. } | Stage::Connected(_) => {}
            Stage::Negotiating { header, version } => {
                let body = answer.encode();
                let reply = header.reply_to(body.len());
                client.outbox.push(reply.with_body(&body), Vec::new());
                client.stage = Stage::Negotiated {
                    version: version.clone(),
                    answer: Box::new(answer),
                    terms: terms.clone(),
                };
            }
        }
        let replay = client.irqs.messages(max_fds);
        let kept = match (&client.stage, kept) {
            (
                Stage::Negotiated {
                    version, answer, ..
                },
                Some(server),
            ) => {
                let terms = KeptTerms {
                    version: version.clone(),
                    answer: (**answer).clone(),
                    terms: terms.clone(),
                };
                Some(KeptNegotiation {
                    server,
                    twin: kept_twin,
                    terms,
                    progress: self.server_progress(end),
                })
            }
            _ => None,
        };
        info_limited!("{}: the server has connected", self.settings.name);
        self.link.activate(terms, replay, kept.as_ref());
        if let Some(kept) = kept {
            self.set_recorded(&kept.progress);
        }
        Ok(())
    }

    /// The server refuses VERSION. A client that waits for its answer gets the errno, before its connection ends.
    fn pass_version_refusal(&mut self, error: u32) {
        let why = format!("its server refuses VERSION: errno {error}");
        warn_limited!("{}: the client is cut off: {why}", self.settings.name);
        if let Some(client) = &mut self.client
            && let Stage::Negotiating { header, .. } = client.stage
        {
            client.refuse(&header, i32::try_from(error).unwrap_or(libc::EIO));
        }
        self.commit_client();
        self.flush_client();
        self.end_client(&why);
    }

    /// Sends the replies and the one to `read` to the socket that it has come from.
    fn send_read(&mut self, read: &LargeRead, leg: Leg, end: u64) {
        match leg {
            Leg::Main => {
                let progress = self.server_progress(end);
                self.link.reply_to_read(&mut self.replies, read, &progress);
                if self.replies.is_empty() {
                    self.set_recorded(&progress);
                }
            }
            Leg::Twin => {
                let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
                    return;
                };
                let (outbox, socket) = (&mut twin.outbox, &twin.socket);
                let sent = self.replies.send_read(read, &*self.target, outbox, socket);
                // Otherwise the refusal is among the replies.
                let sent = match sent {
                    Ok(()) if self.replies.is_empty() => self.commit_twin(end),
                    sent => sent,
                };
                if let Err(cause) = sent {
                    self.twin_failed(&cause);
                }
            }
        }
    }

    /// Executes a command of the server. Adds the reply to [`Proxy::replies`], if the server wants one, or sends it at once
    /// with those that are there.
    pub(super) fn execute(
        &mut self,
        message: &Message<&[u8]>,
        leg: Leg,
    ) -> Result<(), CutOffReason> {
        let header = &message.header;
        match Command::from_number(header.command) {
            Some(command @ (Command::DmaRead | Command::DmaWrite)) => {
                check_command(command, message.body, message.descriptors.len())
                    .map_err(|e| e.to_string())?;
                let (target, replies) = (&*self.target, &mut self.replies);
                let large = dma::serve(target, header, command, message.body, replies)
                    .map_err(|e| e.to_string())?;
                if let Some(read) = large {
                    self.send_read(&read, leg, message.end);
                }
            }
            Some(_) | None => self.replies.refuse(header, libc::ENOTSUP),
        }
        Ok(())
    }
}

/// Whether a reply may have descriptors.
fn may_have_descriptors(reply: &Header) -> bool {
    let command = Command::from_number(reply.command);
    reply.kind == Kind::Reply && command.is_some_and(|command| command.reply_descriptors() > 0)
}

/// Checks the server's reply to a command of the client. `accesses_nothing` says that the command accesses 0 bytes.
fn check_reply_to(
    command: &Header,
    accesses_nothing: bool,
    reply: &Message<&[u8]>,
) -> Result<(), CutOffReason> {
    let have = reply.descriptors.len();
    let command = Command::from_number(command.command);
    let checked = match command.filter(|_| reply.header.kind == Kind::Reply) {
        Some(command) if accesses_nothing && reply.body.is_empty() => {
            check_empty_reply(command, have)
        }
        Some(command) => check_reply(command, reply.body, have),
        None if have > 0 => return Err(format!("its refusal has {have} descriptors")),
        None => Ok(()),
    };
    checked.map_err(|e| e.to_string())
}

//! The server, and what it says.

use std::sync::Arc;

use rustix::event::PollFlags;

use super::peers::{MAX_WAITING, Stage, TURN, Twin};
use super::proxy::{CutOffReason, Proxy};
use crate::vfio_user::dma;
use crate::vfio_user::link::Settled;
use crate::vfio_user::message::{Command, Header, Kind, check_command, check_reply};
use crate::vfio_user::socket::{Message, Outbox, OutgoingFd, Received, Receiver};
use crate::vfio_user::version::Version;
use crate::{info_limited, warn_limited};

impl Proxy {
    pub(super) fn server_ready(&mut self, flags: PollFlags) {
        if flags.contains(PollFlags::OUT) {
            self.link.flush();
        }
        for _ in 0..TURN {
            let pulse = self.link.status();
            let Some(server) = &mut self.server else {
                return;
            };
            if !pulse.connected || pulse.session != server.session {
                return self.server_lost();
            }
            if pulse.bytes >= MAX_WAITING {
                if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
                    self.link.end();
                }
                return;
            }
            let done = match server.receiver.receive(&server.socket) {
                Ok(Received::Message(message)) => self.server_says(message),
                Ok(Received::Nothing) => break,
                Ok(Received::End) => {
                    warn_limited!("{}: the server has hung up", self.settings.name);
                    self.link.end();
                    return self.server_lost();
                }
                Err(cause) => Err(cause.to_string()),
            };
            if let Err(why) = done {
                return self.end_server(&why);
            }
        }
        self.flush_client();
    }

    fn server_says(&mut self, message: Message) -> Result<(), CutOffReason> {
        if matches!(message.header.kind, Kind::Command { .. }) {
            if let Some(reply) = self.serve(&message)? {
                self.link.reply(reply);
            }
            return Ok(());
        }
        let client_header = match self.link.settle(&message.header) {
            Settled::Done => return Ok(()),
            Settled::Wrong(what) => return Err(what.into()),
            Settled::Version => return self.agree(message),
            Settled::Client(header) => header,
        };
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        if message.header.kind == Kind::Reply
            && let Some(command) = Command::from_number(client_header.command)
        {
            check_reply(command, &message.body, message.descriptors.len())
                .map_err(|e| e.to_string())?;
        }
        let takes = match &client.stage {
            Stage::Agreed { terms, .. } => terms.client_descriptors,
            Stage::Fresh(_) | Stage::Asked { .. } => 0,
        };
        if message.descriptors.len() > takes
            || (message.header.kind != Kind::Reply && !message.descriptors.is_empty())
        {
            let have = message.descriptors.len();
            return Err(format!(
                "a reply with {have} descriptors; the client takes {takes}"
            ));
        }
        client.holds_descriptors |= !message.descriptors.is_empty();
        let reply = Header {
            id: client_header.id,
            ..message.header
        };
        let descriptors = message.descriptors.into_iter().map(OutgoingFd::Owned);
        client
            .outbox
            .push(reply.with_body(&message.body), descriptors.collect());
        Ok(())
    }

    /// The server has answered VERSION.
    fn agree(&mut self, message: Message) -> Result<(), CutOffReason> {
        let (Some(client), Some(server)) = (&mut self.client, &mut self.server) else {
            return Ok(());
        };
        let asked = match &client.stage {
            Stage::Fresh(_) => return Ok(()),
            Stage::Asked { version, .. } | Stage::Agreed { version, .. } => version,
        };
        let agreed = match message.header.kind {
            Kind::Refusal(error) => Err(format!("it refuses VERSION: errno {error}")),
            Kind::Command { .. } | Kind::Reply => Version::decode(&message.body)
                .and_then(|said| asked.answer(&said, message.descriptors.len()))
                .map_err(|e| e.to_string()),
        };
        let (answer, terms) = match agreed {
            Ok(agreed) => agreed,
            Err(why) => {
                self.end_client("there is no server for it");
                return Err(why);
            }
        };
        server.answer_until = None;
        let twin = terms.twin.and_then(|at| {
            let mut descriptors = message.descriptors;
            (at < descriptors.len()).then(|| descriptors.swap_remove(at))
        });
        server.twin = twin.map(|socket| Twin {
            socket: Arc::new(socket),
            receiver: Receiver::default(),
            outbox: Outbox::default(),
        });
        let most = terms.server_descriptors;
        match &client.stage {
            Stage::Agreed { answer: before, .. } if **before != answer => {
                self.end_client("its server has come back another one");
                return Ok(());
            }
            Stage::Agreed { .. } | Stage::Fresh(_) => {}
            Stage::Asked { header, version } => {
                let body = answer.encode();
                let reply = header.reply_to(body.len());
                client.outbox.push(reply.with_body(&body), Vec::new());
                client.stage = Stage::Agreed {
                    version: version.clone(),
                    answer: Box::new(answer),
                    terms: terms.clone(),
                };
            }
        }
        let again = client.irqs.messages(most);
        info_limited!("{}: the server has connected", self.settings.name);
        self.link.come_up(terms, || self.target.windows(), again);
        Ok(())
    }

    pub(super) fn twin_ready(&mut self, flags: PollFlags) {
        for _ in 0..TURN {
            let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
                return;
            };
            if let Err(cause) = twin.outbox.flush(&twin.socket) {
                return self.end_server(&cause.to_string());
            }
            if twin.outbox.len_bytes() >= MAX_WAITING {
                if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
                    self.end_server("it has closed the socket of its commands");
                }
                return;
            }
            let received = twin.receiver.receive(&twin.socket);
            let done = match received {
                Ok(Received::Message(message)) => {
                    if matches!(message.header.kind, Kind::Command { .. }) {
                        self.serve(&message)
                    } else {
                        Err("a reply on the socket of its commands".into())
                    }
                }
                Ok(Received::Nothing) => return,
                Ok(Received::End) => Err("it has closed the socket of its commands".into()),
                Err(cause) => Err(cause.to_string()),
            };
            match done {
                Ok(None) => {}
                Ok(Some(reply)) => {
                    let Some(twin) = self.server.as_mut().and_then(|s| s.twin.as_mut()) else {
                        return;
                    };
                    twin.outbox.push(reply, Vec::new());
                    if let Err(cause) = twin.outbox.flush(&twin.socket) {
                        return self.end_server(&cause.to_string());
                    }
                }
                Err(why) => return self.end_server(&why),
            }
        }
    }

    /// Does what a command of the server's asks for. Returns the reply, if one is wanted.
    fn serve(&self, message: &Message) -> Result<Option<Vec<u8>>, CutOffReason> {
        let header = &message.header;
        let reply = match Command::from_number(header.command) {
            Some(command @ (Command::DmaRead | Command::DmaWrite)) => {
                check_command(command, &message.body, message.descriptors.len())
                    .map_err(|e| e.to_string())?;
                dma::serve(&*self.target, header, command, &message.body)
                    .map_err(|e| e.to_string())?
            }
            Some(_) | None => header.refusal_of(libc::ENOTSUP).encode().to_vec(),
        };
        Ok((!header.wants_no_reply()).then_some(reply))
    }
}

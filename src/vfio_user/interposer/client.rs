//! The client's messages: each is forwarded, answered here or refused.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use zerocopy::IntoBytes;

use super::peers::{MESSAGES_PER_TURN, Stage};
use super::proxy::{CutOffReason, Proxy};
use crate::process::event_loop::Events;
use crate::process::peer_event;
use crate::vfio_user::message::{
    Command, DmaMapBody, DmaUnmapBody, FEATURE_INDEX, FEATURES_DMA_LOGGING, FeatureBody,
    IRQ_DATA_EVENTFD, IrqSetBody, Kind, RegionAccessBody, check_command, take,
};
use crate::vfio_user::socket::{Message, OutgoingFd, Received};
use crate::vfio_user::version::Version;
use crate::warn_limited;

impl Proxy {
    pub(super) fn client_ready(&mut self, events: Events) {
        if events.contains(Events::EPOLLOUT) {
            self.flush_client();
        }
        for _ in 0..MESSAGES_PER_TURN {
            let status = self.link.status();
            let Some(client) = &mut self.client else {
                return;
            };
            if !client.may_receive(&status) {
                if events.intersects(Events::EPOLLHUP | Events::EPOLLERR) {
                    self.end_client("it has hung up");
                }
                return;
            }
            let outcome = match client.receiver.receive(&*client.socket) {
                Ok(Received::Message(message)) => self.handle_client_message(message),
                Ok(Received::Nothing) => return,
                Ok(Received::End) => return self.end_client("it has hung up"),
                Err(cause) => Err(cause.to_string()),
            };
            match outcome {
                Ok(()) => {
                    self.commit_client();
                    self.flush_client();
                }
                Err(why) => {
                    warn_limited!("{}: the client is cut off: {why}", self.settings.name);
                    return self.end_client(&why);
                }
            }
        }
    }

    fn handle_client_message(&mut self, message: Message) -> Result<(), CutOffReason> {
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let header = message.header;
        if !matches!(header.kind, Kind::Command { .. }) {
            return Err("it sent a reply, and clients get no commands".into());
        }
        let command = Command::from_number(header.command);
        let checked = command.map_or(Ok(()), |command| {
            check_command(command, &message.body, message.descriptors.len())
        });
        let terms = match &client.stage {
            Stage::Negotiated { terms, .. } => terms,
            Stage::Connected(_) | Stage::Negotiating { .. } => {
                if command != Some(Command::Version) {
                    return Err("its first message is not VERSION".into());
                }
                checked.map_err(|e| e.to_string())?;
                let version = Version::decode(&message.body).map_err(|e| e.to_string())?;
                version.proposal().map_err(|e| e.to_string())?;
                client.stage = Stage::Negotiating { header, version };
                self.connect_at = Instant::now();
                return Ok(());
            }
        };
        let Some(command) = command else {
            client.refuse(&header, libc::ENOTSUP);
            return Ok(());
        };
        if let Err(cause) = checked {
            // As libvfio-user does. The message is whole, so the next one begins where it should.
            warn_limited!(
                "{}: the client's command is refused: {cause}",
                self.settings.name
            );
            client.refuse(&header, libc::EINVAL);
            return Ok(());
        }
        if message.lost_descriptors
            && command == Command::DeviceSetIrqs
            && sets_eventfds(&message.body)
        {
            let why = "the client's connection ends: the daemon died with the descriptors of its interrupts";
            return Err(self.lose(why));
        }
        if let Some(fixed) = &mut client.fixed {
            fixed.record(&header, command, &message.body);
        }
        match command {
            Command::Version => return Err("it sent VERSION twice".into()),
            Command::DmaRead | Command::DmaWrite => {
                return Err(format!(
                    "it sent {command:?}, a command for servers to send"
                ));
            }
            Command::DmaMap => {
                let (body, _) =
                    take::<DmaMapBody>(command, &message.body).map_err(|e| e.to_string())?;
                let outcome = client.windows.map(&body);
                client.answer(&header, outcome, &[]);
                return Ok(());
            }
            Command::DmaUnmap => {
                let (body, _) =
                    take::<DmaUnmapBody>(command, &message.body).map_err(|e| e.to_string())?;
                let outcome = client.windows.unmap(&body);
                client.answer(&header, outcome, body.as_bytes());
                return Ok(());
            }
            // A log of the server has IOVAs, and the client expects guest-physical pages: it would miss
            // pages that were written.
            Command::DirtyPages => {
                client.refuse(&header, libc::ENOTSUP);
                return Ok(());
            }
            Command::DeviceFeature => {
                let (body, _) =
                    take::<FeatureBody>(command, &message.body).map_err(|e| e.to_string())?;
                if FEATURES_DMA_LOGGING.contains(&(body.flags.get() & FEATURE_INDEX)) {
                    client.refuse(&header, libc::ENOTSUP);
                    return Ok(());
                }
            }
            Command::RegionRead | Command::RegionWrite => {
                let (body, _) =
                    take::<RegionAccessBody>(command, &message.body).map_err(|e| e.to_string())?;
                if body.count.get() > terms.server_data {
                    client.refuse(&header, libc::E2BIG);
                    return Ok(());
                }
            }
            Command::DeviceGetInfo
            | Command::DeviceGetRegionInfo
            | Command::DeviceGetRegionIoFds
            | Command::DeviceGetIrqInfo
            | Command::DeviceSetIrqs
            | Command::DeviceReset
            | Command::RegionWriteMulti
            | Command::MigDataRead
            | Command::MigDataWrite => {}
        }
        if message.descriptors.len() > terms.server_descriptors {
            client.refuse(&header, libc::E2BIG);
            return Ok(());
        }
        if command == Command::DeviceSetIrqs
            && let Err(cause) = check_events(&message.descriptors)
        {
            warn_limited!(
                "{}: the client's interrupts are refused: {cause}",
                self.settings.name
            );
            let errno = cause.raw_os_error().unwrap_or(libc::EINVAL);
            client.refuse(&header, errno);
            return Ok(());
        }
        let files = message.descriptors.into_iter().map(File::from);
        let files: Vec<Arc<File>> = files.map(Arc::new).collect();
        if command == Command::DeviceSetIrqs {
            client.irqs.record(&message.body, &files);
        }
        let descriptors = files.into_iter().map(OutgoingFd::Shared).collect();
        let progress = client.progress();
        if !self.link.forward(
            header,
            command,
            &message.body,
            descriptors,
            progress.as_ref(),
        ) {
            client.refuse(&header, libc::EIO);
        } else if let Some(progress) = progress {
            client.set_recorded(progress);
        }
        Ok(())
    }
}

/// Whether a DEVICE_SET_IRQS had descriptors when it was sent.
fn sets_eventfds(body: &[u8]) -> bool {
    let set = take::<IrqSetBody>(Command::DeviceSetIrqs, body);
    set.is_ok_and(|(set, _)| set.flags.get() & IRQ_DATA_EVENTFD != 0 && set.count.get() > 0)
}

/// Checks that the descriptors of interrupts are eventfds. The server signals them by a `write`, which waits for the
/// client if the descriptor is a full pipe, or goes to whatever file the client has chosen.
fn check_events(descriptors: &[OwnedFd]) -> io::Result<()> {
    descriptors
        .iter()
        .try_for_each(|fd| peer_event::check(fd.as_fd()))
}

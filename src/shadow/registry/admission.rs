//! Admission of readers: the checks, and the welcome.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use log::debug;

use super::memory::{memory_frame, send_ram};
use super::reader::Reader;
use super::{Registry, RegistryState};
use crate::ids::EndpointId;
use crate::page_table::words::SharedWords;
use crate::process::rate_limit::RateLimit;
use crate::shadow::frames::send_frame;
use crate::shadow::kept::{KeptReader, Part, ReaderIdentity};
use crate::shadow::process::{Process, own_user, peer_user};
use crate::shadow::sys::send;
use crate::shadow::wire::{
    EPOCH_BYTES, EPOCH_WORDS, Frame, MAGIC, REVOCABLE, Refusal, VERSION, kind,
};
use crate::{info_limited, warn_limited};

/// So many readers of an endpoint may register at once if their descriptors are kept: all that it may have, several times.
const REGISTRATIONS: u32 = 64;
/// After that, one more may in each such time.
const REGISTRATION_REFILL: Duration = Duration::from_millis(200);

/// A peer that may register.
struct Admitted {
    endpoint: EndpointId,
    process: Process,
    is_revocable: bool,
}

impl Registry {
    /// Registers the peer of `stream`, which has sent `greeting`, for one of the endpoints `served`.
    ///
    /// # Errors
    /// The reason of the refusal, which this function has sent to the peer.
    pub fn register(
        &self,
        stream: UnixStream,
        greeting: &Frame,
        served: &[EndpointId],
    ) -> Result<Arc<Reader>, Refusal> {
        let refused = match self.admit(&stream, greeting, served) {
            Ok(admitted) => match self.welcome(stream, admitted) {
                Ok(reader) => {
                    self.counters.registered.inc();
                    info_limited!(
                        "reader {} of endpoint {} is registered",
                        reader.number,
                        reader.endpoint
                    );
                    return Ok(reader);
                }
                Err((stream, refusal, number)) => (stream, refusal, number),
            },
            Err((refusal, number)) => (stream, refusal, number),
        };
        let (stream, refusal, number) = refused;
        self.refuse(&stream, refusal, number);
        Err(refusal)
    }

    /// Sends a peer its refusal, with a number whose meaning depends on it (see [`Refusal`]), and counts it.
    pub fn refuse(&self, stream: &UnixStream, refusal: Refusal, number: u64) {
        self.counters.refused.inc();
        if refusal == Refusal::Full {
            self.counters.refused_full.inc();
        }
        let frame = Frame::new(kind::REFUSED, refusal.code(), [number, 0, 0, 0]);
        // Fails if the peer has closed the connection.
        if let Err(cause) = send(stream, &frame.to_wire(), &[]) {
            debug!("cannot send a refusal to a reader: {cause}");
        }
    }

    fn admit(
        &self,
        stream: &UnixStream,
        greeting: &Frame,
        served: &[EndpointId],
    ) -> Result<Admitted, (Refusal, u64)> {
        let [magic, wanted, features, _] = greeting.numbers;
        if greeting.kind != kind::HELLO || magic != MAGIC {
            return Err((Refusal::NoGreeting, 0));
        }
        if greeting.value != VERSION {
            return Err((Refusal::Version, VERSION.into()));
        }
        let endpoint = u32::try_from(wanted).ok().map(EndpointId);
        let Some(endpoint) = endpoint.filter(|e| served.contains(e)) else {
            return Err((Refusal::Endpoint, wanted));
        };
        let own = own_user();
        let user = peer_user(stream).map_err(|_| (Refusal::Process, 0))?;
        if user != own && !self.limits.users.contains(&user) {
            return Err((Refusal::User, own.into()));
        }
        let process = Process::of_peer(stream).map_err(|cause| {
            debug!("cannot get a handle of a reader's process: {cause}");
            (Refusal::Process, 0)
        })?;
        Ok(Admitted {
            endpoint,
            process,
            is_revocable: features & REVOCABLE != 0,
        })
    }

    fn welcome(
        &self,
        stream: UnixStream,
        admitted: Admitted,
    ) -> Result<Arc<Reader>, (UnixStream, Refusal, u64)> {
        let Admitted {
            endpoint,
            process,
            is_revocable,
        } = admitted;
        let Some((slot, facts)) = self.endpoints.get(&endpoint) else {
            return Err((stream, Refusal::Endpoint, endpoint.0.into()));
        };
        let mut state = self.state.lock();
        state.drop_gone();
        let present = state.readers.iter().filter(|r| r.endpoint == endpoint);
        if present.count() >= self.limits.readers {
            return Err((stream, Refusal::Full, self.limits.readers as u64));
        }
        if self.is_kept() && !state.may_register(endpoint) {
            self.counters.refused_often.inc();
            return Err((stream, Refusal::Resources, 0));
        }
        let number = state.next_number;
        state.next_number = number.saturating_add(1);
        drop(state);
        let sealed = SharedWords::new(c"viommu-epochs", EPOCH_BYTES).and_then(|epochs| {
            epochs.add_seals(libc::F_SEAL_SEAL)?;
            Ok(epochs)
        });
        let epochs = match sealed {
            Ok(epochs) => epochs,
            Err(cause) => {
                debug!("cannot make epoch memory for a reader: {cause}");
                return Err((stream, Refusal::Resources, 0));
            }
        };
        let kept = if self.is_kept() {
            let identity = ReaderIdentity {
                number,
                endpoint,
                is_revocable,
            };
            let parts = [
                (Part::Epochs, epochs.fd()),
                (Part::Socket, stream.as_fd()),
                (Part::Process, process.handle()),
            ];
            // Before the reader gets the page tables: the next daemon must be able to end the registration.
            match KeptReader::keep(&self.keeper, identity, parts) {
                Ok(kept) => Some(kept),
                Err(cause) => {
                    warn_limited!("a reader of endpoint {endpoint} is refused: {cause}");
                    return Err((stream, Refusal::Resources, 0));
                }
            }
        } else {
            None
        };
        let word = self.slots.word(*slot) as u64;
        let numbers = [word, EPOCH_WORDS as u64, facts.reserved.len() as u64, 0];
        let welcome = Frame::new(kind::WELCOME, VERSION, numbers);
        let fds = [self.arena.as_fd(), epochs.fd()];
        let mut state = self.state.lock();
        // The state is locked meanwhile, so UNMAP waits for a peer that does not read.
        let wait = state.begin_wait([endpoint], self.limits.patience);
        let deadline = wait.until(endpoint);
        let mut sent = send_frame(&stream, &welcome, &fds, Some(deadline));
        for range in &facts.reserved {
            let numbers = [range.first().0, range.last().0, 0, 0];
            let frame = Frame::new(kind::RESERVED, 0, numbers);
            sent = sent.and_then(|()| send_frame(&stream, &frame, &[], Some(deadline)));
        }
        for ram in &state.memory {
            sent = sent.and_then(|()| send_ram(&stream, ram, deadline));
        }
        sent = sent.and_then(|()| {
            send_frame(
                &stream,
                &memory_frame(state.generation),
                &[],
                Some(deadline),
            )
        });
        state.charge_until_now(wait);
        if let Err(cause) = sent {
            debug!("cannot send a reader its welcome: {cause}");
            state.unreleased.extend(kept);
            return Err((stream, Refusal::Resources, 0));
        }
        let reader = Arc::new(Reader {
            number,
            endpoint,
            stream,
            epochs,
            process,
            kept,
            is_left: false,
            acknowledged: AtomicU64::new(state.generation),
            gone: AtomicBool::new(false),
            inherited: AtomicBool::new(false),
        });
        // The state has stayed locked since `state.memory` was read. This reader therefore gets every later
        // change of memory, every later UNMAP waits for it, and it finds every earlier change.
        state.readers.push(reader.clone());
        Ok(reader)
    }
}

impl RegistryState {
    /// Whether the endpoint may have one more reader now. Each one costs the process that keeps the descriptors six messages,
    /// and that process serves others, too.
    fn may_register(&mut self, endpoint: EndpointId) -> bool {
        let limit = self.registrations.entry(endpoint);
        let limit = limit.or_insert_with(|| RateLimit::new(REGISTRATIONS, REGISTRATION_REFILL));
        limit.take(Instant::now()).is_ok()
    }
}

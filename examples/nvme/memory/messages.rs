//! Guest memory by messages: the client executes each access.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use parking_lot::{Condvar, Mutex};
use vhost_device_iommu::vfio_user::message::{
    Command, DmaAccessBody, DmaMapBody, DmaUnmapBody, Header, Kind, MAX_DATA, take,
};
use zerocopy::IntoBytes;

use super::{DmaError, Gate, Memory, Segment};

/// Sends messages to the client.
pub trait Outbound: Send + Sync {
    /// Sends a message, or queues it.
    fn send(&self, message: Vec<u8>);
}

/// Accesses that the client executes.
pub struct Messages {
    outbound: Box<dyn Outbound>,
    state: Mutex<State>,
    answered: Condvar,
}

struct State {
    /// The maximum number of bytes of one access.
    max_data: usize,
    next_id: u16,
    /// Requests by number, and their replies.
    pending: HashMap<u16, Option<Answer>>,
    /// The client is gone.
    closed: bool,
}

/// The outcome of a request, with the bytes read.
type Answer = Result<Vec<u8>, DmaError>;

impl Messages {
    /// Memory without pending requests. `outbound` sends the requests.
    pub fn new(outbound: Box<dyn Outbound>) -> Self {
        Self {
            outbound,
            state: Mutex::new(State {
                max_data: 4096,
                next_id: 0,
                pending: HashMap::new(),
                closed: false,
            }),
            answered: Condvar::new(),
        }
    }

    /// Sets the maximum number of bytes that the client transfers with one message.
    pub fn set_max_data(&self, bytes: u64) {
        let bytes = bytes.clamp(64, MAX_DATA.into());
        self.state.lock().max_data = usize::try_from(bytes).unwrap_or(64);
    }

    /// Records a reply. Returns false if the reply belongs to no request, or if the request has a reply
    /// already.
    pub fn handle_reply(&self, header: &Header, body: &[u8]) -> bool {
        let answer = match (header.kind, Command::from_number(header.command)) {
            (Kind::Reply, Some(command @ Command::DmaRead)) => {
                match take::<DmaAccessBody>(command, body) {
                    Ok((_, data)) => Ok(data.to_vec()),
                    Err(cause) => Err(DmaError::Refused(cause.to_string())),
                }
            }
            (Kind::Reply, Some(Command::DmaWrite)) => Ok(Vec::new()),
            (Kind::Refusal(errno), Some(Command::DmaRead | Command::DmaWrite)) => {
                let cause = std::io::Error::from_raw_os_error(errno.cast_signed());
                Err(DmaError::Refused(cause.to_string()))
            }
            (Kind::Command { .. } | Kind::Reply | Kind::Refusal(_), _) => return false,
        };
        let mut state = self.state.lock();
        match state.pending.get_mut(&header.id) {
            Some(waiting @ None) => *waiting = Some(answer),
            Some(Some(_)) | None => return false,
        }
        self.answered.notify_all();
        true
    }

    /// Fails all pending and future requests: the client is gone.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.answered.notify_all();
    }

    /// Sends a request for an access. Returns its number.
    fn request(
        &self,
        gate: &Gate,
        command: Command,
        at: Segment,
        data: &[u8],
    ) -> Result<u16, DmaError> {
        let body = DmaAccessBody {
            address: at.address.into(),
            count: (at.len as u64).into(),
        };
        let _open = gate.enter()?;
        let mut state = self.state.lock();
        if state.closed {
            return Err(DmaError::Closed);
        }
        // There is a free number: far fewer requests than numbers are pending.
        while state.pending.contains_key(&state.next_id) {
            state.next_id = state.next_id.wrapping_add(1);
        }
        let id = state.next_id;
        state.next_id = id.wrapping_add(1);
        state.pending.insert(id, None);
        let body = [body.as_bytes(), data].concat();
        self.outbound
            .send(Header::command(id, command, 0).with_body(&body));
        Ok(id)
    }

    /// Waits for the reply to a request.
    fn wait(&self, id: u16) -> Answer {
        let mut state = self.state.lock();
        loop {
            if let Some(Some(_)) = state.pending.get(&id) {
                return state
                    .pending
                    .remove(&id)
                    .flatten()
                    .unwrap_or(Err(DmaError::Closed));
            }
            if state.closed {
                state.pending.remove(&id);
                return Err(DmaError::Closed);
            }
            self.answered.wait(&mut state);
        }
    }

    /// Splits segments into pieces that the client transfers with one message.
    fn pieces(&self, segments: &[Segment]) -> Vec<Segment> {
        let max = self.state.lock().max_data;
        let cut = |segment: &Segment| {
            let Segment { address, len } = *segment;
            (0..len).step_by(max).map(move |at| Segment {
                address: address.wrapping_add(at as u64),
                len: max.min(len - at),
            })
        };
        segments.iter().flat_map(cut).collect()
    }

    /// Waits for the replies to all requests, even after a failure, so that every number is released.
    fn collect(
        &self,
        ids: Vec<u16>,
        mut each: impl FnMut(Vec<u8>) -> bool,
    ) -> Result<(), DmaError> {
        let mut first_failure = Ok(());
        for id in ids {
            let failure = match self.wait(id) {
                Ok(data) => {
                    if each(data) {
                        continue;
                    }
                    DmaError::Refused("the client sent another number of bytes".into())
                }
                Err(cause) => cause,
            };
            if first_failure.is_ok() {
                first_failure = Err(failure);
            }
        }
        first_failure
    }
}

impl Memory for Messages {
    fn read(&self, gate: &Gate, from: &[Segment], into: &mut [u8]) -> Result<(), DmaError> {
        let pieces = self.pieces(from);
        let mut ids = Vec::with_capacity(pieces.len());
        // All requests at once: a round trip costs more than the transfer of the data.
        let sent = pieces.iter().try_for_each(|piece| {
            ids.push(self.request(gate, Command::DmaRead, *piece, &[])?);
            Ok(())
        });
        let mut rest = into;
        let mut lens = pieces.iter().map(|piece| piece.len);
        let collected = self.collect(ids, |data| {
            let len = lens.next().unwrap_or(0);
            match std::mem::take(&mut rest).split_at_mut_checked(len) {
                Some((piece, later)) if data.len() == len => {
                    piece.copy_from_slice(&data);
                    rest = later;
                    true
                }
                Some(_) | None => false,
            }
        });
        sent.and(collected)
    }

    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError> {
        let mut rest = from;
        let mut ids = Vec::new();
        let sent = self.pieces(to).into_iter().try_for_each(|piece| {
            let (data, later) = rest.split_at_checked(piece.len).unwrap_or_default();
            rest = later;
            ids.push(self.request(gate, Command::DmaWrite, piece, data)?);
            Ok(())
        });
        let collected = self.collect(ids, |_| true);
        sent.and(collected)
    }

    fn map(&self, _: &DmaMapBody, _: Option<OwnedFd>) -> Result<(), i32> {
        Ok(())
    }

    fn unmap(&self, _: &DmaUnmapBody) -> Result<(), i32> {
        Ok(())
    }
}

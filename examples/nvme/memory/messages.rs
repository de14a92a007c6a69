//! Guest memory by messages: each access is asked for, and the client serves it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use parking_lot::{Condvar, Mutex};
use vhost_device_iommu::vfio_user::message::{
    Command, DmaAccessBody, DmaMapBody, DmaUnmapBody, Header, Kind, MAX_DATA, take,
};
use zerocopy::IntoBytes;

use super::{DmaError, Gate, Memory, Segment};

/// Where messages to the client go.
pub trait Outbound: Send + Sync {
    /// Sends a message, or has it sent later.
    fn send(&self, message: Vec<u8>);
}

/// Accesses the client serves.
pub struct Messages {
    outbound: Box<dyn Outbound>,
    state: Mutex<State>,
    answered: Condvar,
}

struct State {
    /// The most bytes of one access.
    max_data: usize,
    next_id: u16,
    /// Accesses that were asked for, and their answers.
    asked: HashMap<u16, Option<Answer>>,
    /// The client is gone.
    ended: bool,
}

/// What the client has said, with the bytes it has read.
type Answer = Result<Vec<u8>, DmaError>;

impl Messages {
    /// Accesses that nobody has asked for yet.
    pub fn new(outbound: Box<dyn Outbound>) -> Self {
        Self {
            outbound,
            state: Mutex::new(State {
                max_data: 4096,
                next_id: 0,
                asked: HashMap::new(),
                ended: false,
            }),
            answered: Condvar::new(),
        }
    }

    /// What the client can serve with one message.
    pub fn set_max_data(&self, bytes: u64) {
        let bytes = bytes.clamp(64, MAX_DATA.into());
        self.state.lock().max_data = usize::try_from(bytes).unwrap_or(64);
    }

    /// Takes a reply. False where it is none to anything that was asked.
    pub fn take_reply(&self, header: &Header, body: &[u8]) -> bool {
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
        match state.asked.get_mut(&header.id) {
            Some(waiting @ None) => *waiting = Some(answer),
            Some(Some(_)) | None => return false,
        }
        self.answered.notify_all();
        true
    }

    /// Nobody will answer any more.
    pub fn end(&self) {
        self.state.lock().ended = true;
        self.answered.notify_all();
    }

    /// Asks for an access, and says under which number.
    fn ask(
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
        if state.ended {
            return Err(DmaError::Closed);
        }
        // Far fewer than there are numbers are asked for at once.
        while state.asked.contains_key(&state.next_id) {
            state.next_id = state.next_id.wrapping_add(1);
        }
        let id = state.next_id;
        state.next_id = id.wrapping_add(1);
        state.asked.insert(id, None);
        let body = [body.as_bytes(), data].concat();
        self.outbound
            .send(Header::command(id, command, 0).with_body(&body));
        Ok(id)
    }

    /// Waits for the answer.
    fn wait(&self, id: u16) -> Answer {
        let mut state = self.state.lock();
        loop {
            if let Some(Some(_)) = state.asked.get(&id) {
                return state
                    .asked
                    .remove(&id)
                    .flatten()
                    .unwrap_or(Err(DmaError::Closed));
            }
            if state.ended {
                state.asked.remove(&id);
                return Err(DmaError::Closed);
            }
            self.answered.wait(&mut state);
        }
    }

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

    /// Waits for all answers, also after a failure, so that no number stays taken.
    fn gather(&self, ids: Vec<u16>, mut each: impl FnMut(Vec<u8>) -> bool) -> Result<(), DmaError> {
        let mut first_failure = Ok(());
        for id in ids {
            let failure = match self.wait(id) {
                Ok(data) => {
                    if each(data) {
                        continue;
                    }
                    DmaError::Refused("the client has sent another number of bytes".into())
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
        // All at once: a round trip costs more than what goes over it.
        let asked = pieces.iter().try_for_each(|piece| {
            ids.push(self.ask(gate, Command::DmaRead, *piece, &[])?);
            Ok(())
        });
        let mut rest = into;
        let mut lens = pieces.iter().map(|piece| piece.len);
        let gathered = self.gather(ids, |data| {
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
        asked.and(gathered)
    }

    fn write(&self, gate: &Gate, to: &[Segment], from: &[u8]) -> Result<(), DmaError> {
        let mut rest = from;
        let mut ids = Vec::new();
        let asked = self.pieces(to).into_iter().try_for_each(|piece| {
            let (data, later) = rest.split_at_checked(piece.len).unwrap_or_default();
            rest = later;
            ids.push(self.ask(gate, Command::DmaWrite, piece, data)?);
            Ok(())
        });
        let gathered = self.gather(ids, |_| true);
        asked.and(gathered)
    }

    fn map(&self, _: &DmaMapBody, _: Option<OwnedFd>) -> Result<(), i32> {
        Ok(())
    }

    fn unmap(&self, _: &DmaUnmapBody) -> Result<(), i32> {
        Ok(())
    }
}

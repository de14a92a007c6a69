//! The process dies at every step of the relay. The VMM gets each reply exactly once, and notices nothing else.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use vhost::vhost_user::message::FrontendReq as Req;

use super::Steps;
use super::bed::{Life, Manager, Sent, Socket, Vmm, event, memfd, wait_for};
use crate::device::Device;
use crate::device::testing::device;
use crate::transport::vhost_user::LeftVmm;

const USER: u64 = 0x7000_0000;
const RAM: u64 = 0x10_0000;
const PROTOCOL: u64 = 1 << 30;

/// All messages of a VMM that starts its rings, stops them, changes memory, and starts them again.
pub(super) fn script() -> Vec<Sent> {
    let ram = memfd(RAM);
    let more = memfd(RAM);
    let events: Vec<Arc<OwnedFd>> = (0..5).map(|_| event()).collect();
    let features = PROTOCOL | Device::offered_features();
    let ring = |index: u32| {
        let at = USER + 0x1_0000 * u64::from(index + 1);
        let mut addresses = u64::from(index).to_ne_bytes().to_vec();
        for address in [at, at + 0x2000, at + 0x1000, 0] {
            addresses.extend(address.to_ne_bytes());
        }
        let number = u64::from(index);
        let (kick, call) = (&events[index as usize * 2], &events[index as usize * 2 + 1]);
        [
            Sent::ring(Req::SET_VRING_NUM, index, 16),
            // The same message twice: each must count.
            Sent::ring(Req::SET_VRING_BASE, index, 0),
            Sent::ring(Req::SET_VRING_BASE, index, 0),
            Sent::new(Req::SET_VRING_ADDR, &addresses).acked(),
            Sent::words(Req::SET_VRING_CALL, &[number]).with(&[call]),
            Sent::words(Req::SET_VRING_KICK, &[number]).with(&[kick]),
            Sent::ring(Req::SET_VRING_ENABLE, index, 1).acked(),
        ]
    };
    let config: Vec<u8> = [0, 40, 0u32]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    let config = [config, vec![0; 40]].concat();
    let mut script = vec![
        Sent::new(Req::SET_OWNER, &[]),
        Sent::new(Req::GET_FEATURES, &[]),
        Sent::new(Req::GET_PROTOCOL_FEATURES, &[]),
        Sent::words(Req::SET_PROTOCOL_FEATURES, &[0xa209]),
        Sent::new(Req::GET_QUEUE_NUM, &[]),
        Sent::words(Req::SET_FEATURES, &[features]).acked(),
        Sent::words(Req::SET_MEM_TABLE, &[1, 0, RAM, USER, 0])
            .with(&[&ram])
            .acked(),
        Sent::new(Req::GET_CONFIG, &config),
    ];
    script.extend(ring(1));
    script.extend(ring(0));
    script.extend([
        Sent::words(Req::ADD_MEM_REG, &[0, RAM, RAM, USER + RAM, 0])
            .with(&[&more])
            .acked(),
        Sent::words(Req::SET_VRING_CALL, &[0])
            .with(&[&events[4]])
            .acked(),
        Sent::ring(Req::GET_VRING_BASE, 0, 0),
        Sent::ring(Req::GET_VRING_BASE, 1, 0),
        Sent::words(Req::REM_MEM_REG, &[0, RAM, RAM, USER + RAM, 0]).acked(),
    ]);
    script.extend(ring(0));
    script.push(Sent::new(Req::GET_MAX_MEM_SLOTS, &[]));
    script
}

type Replies = Vec<Option<Vec<u8>>>;

/// Sends the script in a thread. Stops at the end of the connection.
fn send_all(mut vmm: Vmm, script: Vec<Sent>) -> JoinHandle<(Vmm, io::Result<Replies>)> {
    std::thread::spawn(move || {
        let replies = script.iter().map(|sent| vmm.tell(sent)).collect();
        (vmm, replies)
    })
}

/// Goes on with the VMM that the life before has left.
fn resume(manager: &mut Manager, socket: &Socket, steps: Steps) -> Option<io::Result<Life>> {
    let keeper = manager.keeper();
    let left = match LeftVmm::find(&keeper)? {
        Ok(left) => left,
        Err(cause) => {
            keeper.release_unclaimed();
            return Some(Err(cause));
        }
    };
    keeper.release_unclaimed();
    let restore: Box<dyn FnOnce() + Send> = Box::new(|| {});
    let left = Some((left, restore));
    Some(Ok(Life::start(socket, device().0, keeper, steps, left)))
}

/// What is kept while there is no VMM.
const IDLE: [&str; 3] = ["vmm", "vmm-reply-reader", "vmm-reply-writer"];

fn expected() -> Replies {
    let (socket, mut manager) = (Socket::new(), Manager::new());
    let life = Life::start(
        &socket,
        device().0,
        manager.keeper(),
        Steps::default(),
        None,
    );
    let (vmm, replies) = send_all(socket.connect(), script()).join().expect("sent");
    drop(vmm);
    life.stop();
    replies.expect("all served")
}

/// Ends the relay at `step`, again at `again` steps of the next life, and lets the third one go on. Returns whether the
/// first relay died at all.
fn die_at(step: usize, again: usize, expected: &Replies) -> bool {
    let (socket, mut manager) = (Socket::new(), Manager::new());
    let mut life = Life::start(
        &socket,
        device().0,
        manager.keeper(),
        Steps::until(step),
        None,
    );
    let vmm = send_all(socket.connect(), script());
    let mut has_died = false;
    for next in [again, 0] {
        wait_for("a death or the end", || {
            vmm.is_finished() || life.steps.has_died()
        });
        if !life.steps.has_died() {
            break;
        }
        has_died = true;
        life.stop();
        let next_life = resume(&mut manager, &socket, Steps::until(next));
        life = next_life.expect("a connection").expect("taken over");
    }
    let (vmm, replies) = vmm.join().expect("sent");
    let replies = replies.unwrap_or_else(|cause| panic!("step {step}: {cause}"));
    assert_eq!(&replies, expected, "step {step}");
    assert!(vmm.is_idle(), "step {step}: a reply too many");
    drop(vmm);
    loop {
        wait_for("the end of the connection", || {
            life.steps.has_died() || manager.names() == IDLE
        });
        if !life.steps.has_died() {
            break;
        }
        // After the last reply.
        has_died = true;
        life.stop();
        match resume(&mut manager, &socket, Steps::default()) {
            Some(next_life) => life = next_life.expect("taken over"),
            None => return true,
        }
    }
    life.stop();
    has_died
}

#[test]
fn every_reply_comes_once_wherever_the_relay_dies() {
    let expected = expected();
    let steps = (1..)
        .find(|step| !die_at(*step, 0, &expected))
        .expect("an end");
    assert!(steps > 5 * expected.len(), "{steps} steps");
}

#[test]
fn every_reply_comes_once_if_the_next_process_dies_too() {
    let expected = expected();
    for step in (1..150).step_by(3) {
        for again in 1..4 {
            die_at(step, again, &expected);
        }
    }
}

/// A planned end leaves the connection at the border between two messages.
#[test]
fn a_stopped_server_leaves_its_vmm_to_the_next() {
    let (socket, mut manager) = (Socket::new(), Manager::new());
    let mut life = Life::start(
        &socket,
        device().0,
        manager.keeper(),
        Steps::default(),
        None,
    );
    let mut vmm = socket.connect();
    let expected = expected();
    for (index, (sent, expected)) in script().iter().zip(&expected).enumerate() {
        assert_eq!(
            &vmm.tell(sent).expect("served"),
            expected,
            "message {index}"
        );
        if index % 4 == 3 {
            life.stop();
            life = resume(&mut manager, &socket, Steps::default())
                .expect("a connection")
                .expect("taken over");
        }
    }
    // The VMM goes while nobody serves it.
    life.stop();
    drop(vmm);
    let life = resume(&mut manager, &socket, Steps::default())
        .expect("a connection")
        .expect("taken over");
    wait_for("the end of the connection", || manager.names() == IDLE);
    // And the next one is served, by this life and the next.
    let mut vmm = socket.connect();
    assert_eq!(&vmm.tell(&script()[1]).expect("served"), &expected[1]);
    life.stop();
    let life = resume(&mut manager, &socket, Steps::default())
        .expect("a connection")
        .expect("taken over");
    assert_eq!(&vmm.tell(&script()[1]).expect("served"), &expected[1]);
    drop(vmm);
    life.stop();
}

/// Half a message, replies that are never read, and a flood cost nobody but the VMM anything.
#[test]
fn a_vmm_that_does_not_go_on_does_not_keep_the_server_from_ending() {
    let script = script();
    let half = |vmm: &mut Vmm| {
        let bytes = &script[3].bytes.0;
        assert_eq!(
            super::super::message::send(&vmm.0, &bytes[..7], &[]).expect("sent"),
            7
        );
    };
    let flood = |vmm: &mut Vmm| {
        // Until the relay can send no reply, and takes no message.
        wait_for("a full socket", || vmm.send(&script[1]).is_err());
    };
    for hold in [&half as &dyn Fn(&mut Vmm), &flood] {
        let (socket, mut manager) = (Socket::new(), Manager::new());
        let life = Life::start(
            &socket,
            device().0,
            manager.keeper(),
            Steps::default(),
            None,
        );
        let mut vmm = socket.connect();
        vmm.tell(&script[1]).expect("served");
        hold(&mut vmm);
        life.stop();
        assert!(manager.names().contains(&"vmm-socket.1".to_owned()));
        let life = resume(&mut manager, &socket, Steps::default())
            .expect("a connection")
            .expect("taken over");
        life.stop();
    }
}

#[test]
fn descriptors_that_were_not_kept_are_named_with_the_cure() {
    for missing in ["vmm", "file.0", "file.3"] {
        let (socket, mut manager) = (Socket::new(), Manager::new());
        let life = Life::start(
            &socket,
            device().0,
            manager.keeper(),
            Steps::default(),
            None,
        );
        let mut vmm = socket.connect();
        for sent in &script()[..22] {
            vmm.tell(sent).expect("served");
        }
        life.stop();
        manager.with_files(|files| files.remove(missing).expect("kept"));
        let refused = resume(&mut manager, &socket, Steps::default()).expect("a connection");
        let cause = refused.err().expect("missing").to_string();
        assert!(cause.contains(missing), "{cause}");
        assert!(cause.contains("FileDescriptorStoreMax=1024"), "{cause}");
        assert!(vmm.has_ended());
        assert_eq!(manager.names(), Vec::<String>::new());
    }
}

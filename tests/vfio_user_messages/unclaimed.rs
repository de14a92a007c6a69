//! Clients that take no refusal for an answer, as cloud-hypervisor's: they read as many bytes of any reply as a good one
//! would have.

use crate::bed::Bed;
use crate::connection::{IRQ_INFO, REGION_INFO, REGION_READ, REGION_WRITE, RESET, region};

/// A place whose accesses the server refuses.
const UNSERVED: u64 = 0xffc;
/// A place at which the server has fewer bytes than the client asks for.
const SHORT: u64 = 0xff8;

#[test]
fn every_access_gets_an_answer_of_its_length() {
    let bed = Bed::answering_all_accesses();
    let (mut client, _played) = bed.pair(|server, msg| {
        let at = msg
            .body
            .first_chunk()
            .map_or(0, |at| u64::from_le_bytes(*at));
        match msg.cmd {
            REGION_READ | REGION_WRITE if at == UNSERVED => {
                server.refuse(msg, libc::EINVAL.unsigned_abs());
                true
            }
            REGION_READ if at == SHORT => {
                let mut body = [&msg.body[..16], &[7; 2]].concat();
                body[12] = 2;
                server.reply(msg, &body, &[]);
                true
            }
            _ => false,
        }
    });
    for _ in 0..2 {
        let access = region(UNSERVED, 7, 4, &[]);
        let read = client.call(REGION_READ, &access, &[]);
        assert_eq!(
            (read.errno(), read.body),
            (0, [&access[..], &[0xff; 4]].concat())
        );
        let written = client.call(REGION_WRITE, &region(UNSERVED, 7, 4, &[1; 4]), &[]);
        assert_eq!((written.errno(), written.body), (0, access));
        let access = region(SHORT, 7, 4, &[]);
        let read = client.call(REGION_READ, &access, &[]);
        let expected = [&access[..], &[7, 7, 0xff, 0xff]].concat();
        assert_eq!((read.errno(), read.body), (0, expected));
        // Other refusals stay refusals, and are as long as a reply.
        for (command, len) in [(REGION_INFO, 32), (IRQ_INFO, 16)] {
            let mut body = vec![0; len];
            body[0] = u8::try_from(len).expect("small");
            let refused = client.call(command, &body, &[]);
            assert_eq!((refused.errno(), refused.body), (libc::ENOTSUP, body));
        }
        let good = client.call(REGION_READ, &region(5, 7, 4, &[]), &[]);
        assert_eq!((good.errno(), &good.body[16..]), (0, &[5; 4][..]));
    }
}

#[test]
fn accesses_are_answered_while_the_server_is_gone() {
    let bed = Bed::answering_all_accesses();
    let (mut client, mut server) = bed.raw_pair();
    let access = region(0x10, 0, 8, &[]);
    let ones = [&access[..], &[0xff; 8]].concat();
    let lost = client.ask(REGION_READ, &access, &[]);
    assert_eq!(server.recv().expect("forwarded").cmd, REGION_READ);
    drop(server);
    let reply = client.recv().expect("a reply");
    assert_eq!((reply.id, reply.errno(), &reply.body), (lost, 0, &ones));
    let read = client.call(REGION_READ, &access, &[]);
    assert_eq!((read.errno(), &read.body), (0, &ones));
    let written = client.call(REGION_WRITE, &region(0x10, 0, 8, &[1; 8]), &[]);
    assert_eq!((written.errno(), &written.body), (0, &access));
    assert_eq!(client.call(RESET, &[], &[]).errno(), libc::EIO);
}

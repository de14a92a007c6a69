//! Hostile files: no text may cause a panic, exhaust the stack or put control characters into a message.

use proptest::prelude::*;

use super::{GOOD, parse};
use crate::config::{MAX_ARENA, MAX_WIDTH, MIN_ARENA, MIN_WIDTH};

#[test]
fn messages_carry_no_control_characters() {
    for text in [
        "\"\\u001b[2J\" = 1",
        "\u{7f}\u{1b}[2J",
        "granule = \"\\u001b[2J\"",
    ] {
        let message = parse(text).expect_err(text).to_string();
        assert!(!message.contains(['\u{1b}', '\u{7f}']), "{message:?}");
        assert!(message.contains("\\u{1b}"), "made visible: {message}");
    }
}

#[test]
fn nesting_does_not_exhaust_the_stack() {
    for text in ["[", "a=[", "a={b="] {
        parse(&text.repeat(200_000)).expect_err("no configuration");
    }
    parse(&format!("socket = {}", "[".repeat(900_000))).expect_err("no configuration");
    parse(&format!("{}a = 1", "a.".repeat(400_000))).expect_err("no configuration");
}

/// A piece of configuration, whole or broken.
fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        "(socket|control|address|address-width|bypass|granule|domains|memory|arena-limit|reserved|\
          endpoint|group|vfio|host-iommu|pin|range|first|last|kind) = ",
        "(true|-?[0-9]{1,20}|0x[0-9a-f]{1,17}|'[0-9a-f:.-]{0,16}'|\"\\PC{0,8}\"|[0-9]+\\.[0-9])\n",
        Just("[[endpoint]]\n".to_owned()),
        Just("{ first = 0, last = 0xfff }".to_owned()),
        "[\\[\\]{},\n =]{1,4}",
    ]
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,64}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_mixture_of_fragments_panics(parts in proptest::collection::vec(fragment(), 0..24)) {
        let _ = parse(&parts.concat()).map(|config| config.summary().to_string());
    }

    #[test]
    fn no_mutation_of_a_good_file_panics(
        edits in proptest::collection::vec((0..GOOD.len(), any::<u8>(), 0..3u8), 1..8),
    ) {
        let mut bytes = GOOD.as_bytes().to_vec();
        for (at, byte, how) in edits {
            let at = at % bytes.len();
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        if let Err(error) = parse(&String::from_utf8_lossy(&bytes)) {
            prop_assert!(!error.problems.is_empty());
            prop_assert!(error.to_string().starts_with("vm0.toml"));
        }
    }

    #[test]
    fn a_good_file_with_one_changed_digit_is_refused_or_accepted(at in 0..GOOD.len(), digit in "[0-9a-f]") {
        let mut bytes = GOOD.as_bytes().to_vec();
        if bytes[at].is_ascii_hexdigit() {
            bytes[at] = digit.as_bytes()[0];
        }
        if let Ok(config) = parse(&String::from_utf8_lossy(&bytes)) {
            prop_assert!(config.topology.endpoint(config.topology.iommu().endpoint_id()).is_none());
            prop_assert!((MIN_WIDTH..=MAX_WIDTH).contains(&config.address_width));
            prop_assert!((MIN_ARENA..=MAX_ARENA).contains(&config.arena_limit));
        }
    }
}

//! Compares what a running daemon will leave with this program and the configuration.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::error::UpgradeError;
use crate::config::{ChangedConfig, Config, EndpointChanges};
use crate::daemon::handover::{ROOM, describe_endpoint, formats, handover_with};
use crate::ids::EndpointId;
use crate::process::handover::Handover;
use crate::topology::{PciAddress, PciRange};

/// Whether a daemon of this program with `config` can go on where the one with this `status` and these `endpoints` ends.
pub(super) fn compare(
    file: &Path,
    config: &Config,
    status: &Value,
    endpoints: &Value,
) -> Result<(), UpgradeError> {
    let theirs = Handover::deserialize(&status["handover"]).map_err(UpgradeError::Silent)?;
    if status["life"]["kept"] != true {
        return Err(UpgradeError::NotKept);
    }
    // Without a VMM there is no guest that could notice.
    if status["connected"] != true {
        return Ok(());
    }
    let changed = changed_config(file, config, &theirs)?;
    let config = &changed.whole;
    let room = theirs.offer.get(ROOM).and_then(|room| room.parse().ok());
    // The next daemon offers what the guest was offered if an endpoint is gone that had more regions.
    let least = room.filter(|_| changed.changes.has_removals()).unwrap_or(0);
    let ours = handover_with(config, &changed.changes, least);
    // Not those that this configuration uses: another transport is a matter of the offer.
    let readable = formats();
    for (name, &version) in &theirs.formats {
        let reads = readable.get(name).copied();
        if reads != Some(version) {
            let name = name.clone();
            return Err(UpgradeError::Format {
                name,
                version,
                reads,
            });
        }
    }
    for name in theirs.offer.keys().chain(ours.offer.keys()) {
        let (was, now) = (theirs.offer.get(name), ours.offer.get(name));
        if was != now {
            return Err(UpgradeError::Offer {
                name: name.clone(),
                was: was.cloned(),
                now: now.cloned(),
                file: file.to_owned(),
            });
        }
    }
    // More features than before do no harm: the driver has made its choice.
    if theirs.features & !ours.features != 0 {
        return Err(UpgradeError::Offer {
            name: "features".into(),
            was: Some(format!("{:#x}", theirs.features)),
            now: Some(format!("{:#x}", ours.features)),
            file: file.to_owned(),
        });
    }
    check_endpoints(file, config, &theirs, endpoints)?;
    let (used, limit) = (
        status["arena"]["used_bytes"].as_u64().unwrap_or(0),
        config.arena_limit,
    );
    if used > limit {
        return Err(UpgradeError::Arena {
            used,
            limit,
            file: file.to_owned(),
        });
    }
    if !theirs.ends.is_empty() {
        return Err(UpgradeError::Ends(theirs.ends.join("; ")));
    }
    Ok(())
}

/// The configuration that the next daemon will have: the file's, with the endpoints that `ctl` has added and removed.
fn changed_config(
    file: &Path,
    config: &Config,
    theirs: &Handover,
) -> Result<ChangedConfig, UpgradeError> {
    let changes = match &theirs.changes {
        Value::Null => EndpointChanges::default(),
        changes => EndpointChanges::deserialize(changes).map_err(UpgradeError::Silent)?,
    };
    let mut changed = changes.apply(config);
    match changed.contradictions.pop() {
        None => Ok(changed),
        Some(contradiction) => Err(UpgradeError::Contradiction {
            contradiction,
            file: file.to_owned(),
        }),
    }
}

/// Whether each endpoint that the guest can use is configured, and with the group and the reserved regions that it has now.
fn check_endpoints(
    file: &Path,
    config: &Config,
    theirs: &Handover,
    endpoints: &Value,
) -> Result<(), UpgradeError> {
    let described = theirs.endpoints.iter();
    let described = described.filter_map(|(range, text)| Some((range.parse().ok()?, text)));
    let mut described: Vec<(PciRange, &String)> = described.collect();
    described.sort_unstable();
    for endpoint in endpoints["endpoints"].as_array().into_iter().flatten() {
        if endpoint["state"] == "unattached" && endpoint["dma"] == "blocked" {
            continue;
        }
        let address = endpoint["address"].as_str().unwrap_or("unknown").to_owned();
        let id = endpoint["id"].as_u64();
        let id = id.and_then(|id| u32::try_from(id).ok()).map(EndpointId);
        let info = id.and_then(|id| Some((id, config.topology.endpoint(id)?)));
        let Some((id, info)) = info else {
            return Err(UpgradeError::Endpoint {
                address,
                file: file.to_owned(),
            });
        };
        let at = PciAddress::from_endpoint_id(id);
        let next = described.partition_point(|(range, _)| range.last() < at);
        let was = described.get(next).filter(|(range, _)| range.contains(at));
        let was = was.map(|(_, text)| (*text).clone());
        let now = describe_endpoint(&config.topology, info);
        if was != now {
            return Err(UpgradeError::EndpointOffer {
                address,
                was,
                now,
                file: file.to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const FILE: &str = "vm.toml";

    fn config() -> Config {
        let text =
            "address = \"00:05.0\"\narena-limit = \"1M\"\n[[endpoint]]\naddress = \"00:06.0\"\n";
        Config::from_text(Path::new(FILE), text).expect("a configuration")
    }

    /// The status of a daemon with the same configuration, after a change.
    fn outcome(change: impl FnOnce(&mut Value, &mut Value)) -> Result<(), String> {
        let config = config();
        let told = handover_with(&config, &EndpointChanges::default(), 0);
        let mut status = json!({
            "connected": true,
            "life": { "kept": true },
            "arena": { "used_bytes": 1 << 20 },
            "handover": serde_json::to_value(told).expect("JSON"),
        });
        let attached = json!({ "id": 0x30, "address": "0000:00:06.0", "state": "attached",
                               "dma": "translated" });
        let mut endpoints = json!({ "endpoints": [attached] });
        change(&mut status, &mut endpoints);
        compare(Path::new(FILE), &config, &status, &endpoints).map_err(|error| error.to_string())
    }

    #[test]
    fn a_daemon_of_the_same_kind_may_leave() {
        assert_eq!(outcome(|_, _| ()), Ok(()));
    }

    #[test]
    fn a_daemon_whose_state_would_be_refused_goes_on() {
        type Change = fn(&mut Value, &mut Value);
        let cases: [(Change, &str); 13] = [
            (
                |s, _| s["handover"] = Value::Null,
                "of a version that does not tell",
            ),
            (|s, _| s["handover"]["formats"] = json!(7), "does not tell"),
            (
                |s, _| s["life"]["kept"] = false.into(),
                "nobody keeps its state",
            ),
            (
                |s, _| s["handover"]["formats"]["state"] = 99.into(),
                "\"state\" of version 99",
            ),
            (
                |s, _| s["handover"]["formats"]["more"] = 1.into(),
                "reads none",
            ),
            (
                |s, _| s["handover"]["offer"]["domains"] = "3".into(),
                "\"domains\": 3, and vm.toml has: ",
            ),
            (
                |s, _| s["handover"]["offer"]["more"] = "3".into(),
                "\"more\": 3, and vm.toml has: none",
            ),
            (
                |s, _| s["arena"]["used_bytes"] = ((1 << 20) + 1).into(),
                "`arena-limit` of 1048576",
            ),
            (
                |_, e| e["endpoints"][0]["id"] = 0x31.into(),
                "which vm.toml does not have",
            ),
            (
                |_, e| {
                    e["endpoints"][0] =
                        json!({ "id": 0x31, "state": "unattached", "dma": "bypass" });
                },
                "which vm.toml does not have",
            ),
            (
                |s, _| s["handover"]["endpoints"] = json!({ "0000:00:06.0": "group g" }),
                "offered with: group g, and vm.toml has: none",
            ),
            (
                |s, _| {
                    s["handover"]["endpoints"] = json!({ "0000:00:06.0-0000:00:07.7": "group g" });
                },
                "offered with: group g",
            ),
            (
                |s, _| s["handover"]["features"] = u64::MAX.into(),
                "\"features\": 0xffffffffffffffff",
            ),
        ];
        for (change, expected) in cases {
            let refused = outcome(change).expect_err(expected);
            assert!(refused.contains(expected), "{expected} in {refused}");
            assert!(refused.contains("goes on"), "{refused}");
        }
        let refused = outcome(|s, _| s["handover"]["ends"] = json!(["one", "two"]));
        assert!(refused.expect_err("ends").contains("one; two"));
    }

    #[test]
    fn without_a_vmm_another_offer_is_no_obstacle() {
        let done = outcome(|s, _| {
            s["connected"] = false.into();
            s["handover"]["offer"]["domains"] = "3".into();
        });
        assert_eq!(done, Ok(()));
    }

    #[test]
    fn an_endpoint_that_the_guest_does_not_use_may_go() {
        let done = outcome(|_, e| {
            e["endpoints"][0]["id"] = 0x31.into();
            e["endpoints"][0]["state"] = "unattached".into();
            e["endpoints"][0]["dma"] = "blocked".into();
        });
        assert_eq!(done, Ok(()));
    }

    /// With the file's offer the guest would have something that it was not offered.
    #[test]
    fn what_only_the_file_offers_is_an_obstacle_too() {
        let refused = outcome(|s, _| {
            let offer = s["handover"]["offer"].as_object_mut();
            offer.expect("an object").remove("domains");
        });
        let refused = refused.expect_err("another offer");
        assert!(refused.contains("\"domains\": none, and"), "{refused}");
    }

    /// A driver may have begun with the state, although no VMM is connected now.
    #[test]
    fn a_state_that_nobody_keeps_is_an_obstacle_without_a_vmm_too() {
        let refused = outcome(|s, _| {
            s["connected"] = false.into();
            s["life"]["kept"] = false.into();
        });
        let refused = refused.expect_err("the state would end");
        assert!(refused.contains("nobody keeps its state"), "{refused}");
    }

    /// The driver has attached it, so it is more than an endpoint that nobody uses.
    #[test]
    fn an_endpoint_that_is_blocked_in_a_domain_must_be_configured() {
        for state in ["attached", "quarantined"] {
            let refused = outcome(|_, e| {
                e["endpoints"][0]["id"] = 0x31.into();
                e["endpoints"][0]["state"] = state.into();
                e["endpoints"][0]["dma"] = "blocked".into();
            });
            let refused = refused.expect_err(state);
            assert!(refused.contains("which vm.toml does not have"), "{refused}");
        }
    }

    #[test]
    fn features_and_groups_that_nobody_uses_are_no_obstacle() {
        let done = outcome(|s, _| {
            s["handover"]["features"] = 0.into();
            s["handover"]["endpoints"] = json!({ "0000:00:07.0": "group g" });
        });
        assert_eq!(done, Ok(()));
    }

    /// What `ctl` has done to a running daemon with the file's configuration.
    fn after_ctl(added: &str, removed: &str) -> Value {
        let mut config = config();
        let mut changes = EndpointChanges::default();
        for range in removed.split_whitespace() {
            let range = range.parse().expect("a range");
            config = config.without_endpoints(range).expect("removed");
            changes.remove(range).expect("room");
        }
        let (with, range) = config.with_endpoint(added).expect("added");
        changes.add(added, range).expect("room");
        serde_json::to_value(handover_with(&with, &changes, 0)).expect("JSON")
    }

    #[test]
    fn the_next_daemon_has_the_endpoints_that_ctl_has_added() {
        let attach = |e: &mut Value| {
            e["endpoints"][0]["id"] = 0x38.into();
            e["endpoints"][0]["address"] = "0000:00:07.0".into();
        };
        let done = outcome(|s, e| {
            s["handover"] = after_ctl("address = '00:07.0', group = 'g'", "00:06.0");
            attach(e);
        });
        assert_eq!(done, Ok(()));
        // A daemon of an earlier version leaves none.
        let refused = outcome(|s, e| {
            s["handover"]["changes"] = Value::Null;
            attach(e);
        });
        assert!(refused.expect_err("gone").contains("does not have"));
    }

    #[test]
    fn a_file_that_contradicts_an_addition_keeps_the_running_daemon() {
        // The file has the endpoint still.
        let refused = outcome(|s, _| {
            s["handover"] = after_ctl("address = '00:06.0', group = 'g'", "00:06.0");
            s["handover"]["changes"]["removed"] = json!([]);
        });
        let refused = refused.expect_err("contradiction");
        assert!(refused.contains("contradicts the file"), "{refused}");
        let refused = outcome(|s, _| s["handover"]["changes"] = json!([7]));
        assert!(refused.expect_err("no changes").contains("does not tell"));
    }
}

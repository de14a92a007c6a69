//! Compares what a running daemon will leave with this program and the configuration.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::error::UpgradeError;
use crate::config::Config;
use crate::daemon::handover::handover;
use crate::ids::EndpointId;
use crate::process::handover::Handover;

/// Whether a daemon of this program with `config` can go on where the one with this `status` and these `endpoints` ends.
pub(super) fn compare(
    file: &Path,
    config: &Config,
    status: &Value,
    endpoints: &Value,
) -> Result<(), UpgradeError> {
    let theirs = Handover::deserialize(&status["handover"]).map_err(UpgradeError::Silent)?;
    let ours = handover(config);
    if status["life"]["kept"] != true {
        return Err(UpgradeError::NotKept);
    }
    // Without a VMM there is no guest that could notice.
    if status["connected"] != true {
        return Ok(());
    }
    for (name, &version) in &theirs.formats {
        let reads = ours.formats.get(name).copied();
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
    for endpoint in endpoints["endpoints"].as_array().into_iter().flatten() {
        let id = endpoint["id"]
            .as_u64()
            .and_then(|id| u32::try_from(id).ok());
        let is_configured = id.is_some_and(|id| config.topology.endpoint(EndpointId(id)).is_some());
        if endpoint["state"] != "unattached" && !is_configured {
            return Err(UpgradeError::Endpoint {
                address: endpoint["address"].as_str().unwrap_or("unknown").into(),
                file: file.to_owned(),
            });
        }
    }
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
        let mut status = json!({
            "connected": true,
            "life": { "kept": true },
            "arena": { "used_bytes": 1 << 20 },
            "handover": serde_json::to_value(handover(&config)).expect("JSON"),
        });
        let attached = json!({ "id": 0x30, "address": "0000:00:06.0", "state": "attached" });
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
        let cases: [(Change, &str); 9] = [
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
        });
        assert_eq!(done, Ok(()));
    }
}

//! Whether the next daemon has taken over what the one before has left.

use serde_json::Value;

use super::error::UpgradeError;

/// The daemon that was asked to leave.
pub(super) struct Before {
    /// The number of its process.
    process: Option<u64>,
    pub(super) life: u64,
    /// The connections of VMMs that it has accepted.
    pub(super) connections: u64,
    has_vmm: bool,
}

/// How far the next daemon is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Takeover {
    TakingOver,
    /// It has the state, and not the VMM, which the daemon before had.
    WithoutVmm,
    TakenOver,
}

impl Before {
    /// The daemon with this status.
    pub(super) fn new(status: &Value) -> Self {
        Self {
            process: status["life"]["pid"].as_u64(),
            life: status["life"]["number"].as_u64().unwrap_or(1),
            connections: status["connections"].as_u64().unwrap_or(0),
            has_vmm: status["connected"] == true,
        }
    }

    /// Whether `status` is that of another process.
    pub(super) fn is_left(&self, status: &Value) -> bool {
        status["life"]["pid"].as_u64() != self.process
    }

    /// What the status of the next daemon says.
    ///
    /// # Errors
    /// It has not taken everything over.
    pub(super) fn progress(&self, status: &Value) -> Result<Takeover, UpgradeError> {
        let life = &status["life"];
        if life["state"] == "taking-over" {
            return Ok(Takeover::TakingOver);
        }
        // Without a VMM nobody had anything to lose.
        if !self.has_vmm {
            return Ok(Takeover::TakenOver);
        }
        if life["state"] == "refused" {
            let reason = life["reason"].as_str().unwrap_or("no reason");
            return Err(UpgradeError::Refused(reason.into()));
        }
        let lost = life["lost"].as_array().into_iter().flatten();
        let lost: Vec<_> = lost.filter_map(Value::as_str).collect();
        if !lost.is_empty() {
            return Err(UpgradeError::Lost(lost.join("; ")));
        }
        let number = life["number"].as_u64().unwrap_or(0);
        if number <= self.life {
            return Err(UpgradeError::Lost(format!(
                "it found no state of life {}, and its life has the number {number}",
                self.life
            )));
        }
        Ok(if status["connected"] == true {
            Takeover::TakenOver
        } else {
            Takeover::WithoutVmm
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(number: u64) -> Value {
        let life =
            json!({ "pid": 100 + number, "number": number, "state": "taken-over", "lost": [] });
        json!({ "connected": true, "connections": 1, "life": life })
    }

    fn progress(change: impl FnOnce(&mut Value)) -> Result<Takeover, String> {
        let before = Before::new(&status(3));
        let mut next = status(4);
        assert!(before.is_left(&next) && !before.is_left(&status(3)));
        change(&mut next);
        before.progress(&next).map_err(|error| {
            assert!(error.has_left());
            error.to_string()
        })
    }

    #[test]
    fn a_daemon_that_has_lost_something_has_not_taken_over() {
        assert_eq!(progress(|_| ()), Ok(Takeover::TakenOver));
        assert_eq!(
            progress(|s| s["life"]["state"] = "taking-over".into()),
            Ok(Takeover::TakingOver)
        );
        assert_eq!(
            progress(|s| s["connected"] = false.into()),
            Ok(Takeover::WithoutVmm)
        );
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 3] = [
            (
                |s| {
                    s["life"]["state"] = "refused".into();
                    s["life"]["reason"] = "damaged".into();
                },
                "blocked: damaged",
            ),
            (
                |s| s["life"]["lost"] = json!(["a", "b"]),
                "everything over: a; b",
            ),
            (|s| s["life"]["number"] = 1.into(), "no state of life 3"),
        ];
        for (change, expected) in cases {
            let failed = progress(change).expect_err(expected);
            assert!(failed.contains(expected), "{expected} in {failed}");
        }
    }

    #[test]
    fn without_a_vmm_there_is_nothing_to_lose() {
        let mut before = status(3);
        before["connected"] = false.into();
        let mut next = status(1);
        next["life"]["state"] = "refused".into();
        let progress = Before::new(&before).progress(&next);
        assert_eq!(progress.expect("no obstacle"), Takeover::TakenOver);
    }
}

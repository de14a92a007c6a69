//! What runs the guest.

use std::fs;

use serde_json::{Value, json};

/// The exits of all guests of this machine.
const EXITS: &str = "/sys/kernel/debug/kvm/exits";

/// An accelerator of QEMU's, and the machine it is on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// The guest is emulated.
    Tcg,
    /// KVM on a real machine.
    Kvm,
    /// KVM in the emulated machine of `qemu-scripts/l1.sh`.
    KvmInL1,
}

impl Machine {
    /// The machine this is, with the accelerator of this name.
    pub fn new(accel: &str) -> Self {
        match accel {
            "tcg" => Self::Tcg,
            "kvm" if std::env::var_os("VIOMMU_L1").is_some() => Self::KvmInL1,
            "kvm" => Self::Kvm,
            other => panic!("--accel {other}: there are tcg and kvm"),
        }
    }

    /// QEMU's arguments.
    pub fn accel(self) -> &'static [&'static str] {
        match self {
            Self::Tcg => &["-accel", "tcg"],
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // A timer that is set to a time stamp may never go off there.
            Self::KvmInL1 => &["-accel", "kvm", "-cpu", "max,-tsc-deadline,+invtsc"],
        }
    }

    /// Processors of the guest.
    pub fn processors(self) -> usize {
        match self {
            Self::Tcg | Self::Kvm => 2,
            // With more the emulated machine stops at times. It has two itself.
            Self::KvmInL1 => 1,
        }
    }

    /// More for the guest's kernel.
    pub fn append(self) -> String {
        match self {
            Self::Tcg | Self::Kvm => String::new(),
            // Looking at a timer takes a hundred microseconds there, too long to find out how fast
            // time stamps count; without them each look at the clock would take as long.
            Self::KvmInL1 => format!("quiet no_timer_check tsc_early_khz={}", time_stamp_khz()),
        }
    }

    /// More for the daemon's configuration.
    pub fn config(self) -> &'static str {
        match self {
            Self::Tcg | Self::Kvm => "",
            // An exit of the guest's takes a hundred microseconds there, and so the next request after
            // one that was not polled for is further away than the worker polls otherwise.
            Self::KvmInL1 => "poll-max-us = 1000\n",
        }
    }

    /// The figures, in the group where `qemu-scripts/bench.sh --json` has them.
    pub fn in_group(self, figures: Value) -> Value {
        match self {
            Self::Tcg => figures,
            Self::Kvm | Self::KvmInL1 => {
                let mut figures = figures;
                figures["machine"] = json!({ "emulated": self == Self::KvmInL1 });
                json!({ "kvm": figures })
            }
        }
    }

    /// Exits from guests so far, those that run; `None` where KVM does not tell.
    pub fn exits(self) -> Option<u64> {
        match self {
            Self::Tcg => None,
            Self::Kvm | Self::KvmInL1 => fs::read_to_string(EXITS).ok()?.trim().parse().ok(),
        }
    }

    /// A name for the file they are in.
    pub fn fragment(self) -> &'static str {
        match self {
            Self::Tcg => "guest",
            Self::Kvm | Self::KvmInL1 => "guest-kvm",
        }
    }
}

/// How fast time stamps count, in kHz.
fn time_stamp_khz() -> u64 {
    let text = fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let line = text.lines().find(|line| line.starts_with("cpu MHz"));
    // With three places after the point.
    let khz = line.and_then(|line| line.split(':').nth(1)?.trim().replace('.', "").parse().ok());
    khz.expect("the processor's frequency")
}

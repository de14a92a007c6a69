//! The machine and the accelerator that run the guest.

use std::fs;

use serde_json::{Value, json};

/// The exits of all guests on this machine.
const EXITS: &str = "/sys/kernel/debug/kvm/exits";

/// QEMU's accelerator, and the machine it runs on.
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
    /// This machine, with the accelerator of this name.
    pub fn new(accel: &str) -> Self {
        match accel {
            "tcg" => Self::Tcg,
            "kvm" if std::env::var_os("VIOMMU_L1").is_some() => Self::KvmInL1,
            "kvm" => Self::Kvm,
            other => panic!("--accel {other}: there are tcg and kvm"),
        }
    }

    /// QEMU's arguments for the accelerator.
    pub fn accel(self) -> &'static [&'static str] {
        match self {
            Self::Tcg => &["-accel", "tcg"],
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // A timer that is set to a time stamp may never fire there.
            Self::KvmInL1 => &["-accel", "kvm", "-cpu", "max,-tsc-deadline,+invtsc"],
        }
    }

    /// Number of processors of the guest.
    pub fn processors(self) -> usize {
        match self {
            Self::Tcg | Self::Kvm => 2,
            // With more than one, the emulated machine, which has two itself, stops at times.
            Self::KvmInL1 => 1,
        }
    }

    /// Additional parameters of the guest's kernel.
    pub fn append(self) -> String {
        match self {
            Self::Tcg | Self::Kvm => String::new(),
            // Reading a timer takes a hundred microseconds there: too long to measure the frequency
            // of the time stamp counter. Without time stamps, each read of the clock would take as
            // long.
            Self::KvmInL1 => format!("quiet no_timer_check tsc_early_khz={}", time_stamp_khz()),
        }
    }

    /// Additional keys of the daemon's configuration.
    pub fn config(self) -> &'static str {
        match self {
            Self::Tcg | Self::Kvm => "",
            // An exit of the guest takes a hundred microseconds there, which is as long as the
            // worker's longest poll by default. A request that needs an exit would always come after
            // the poll, so the worker would never begin to poll.
            Self::KvmInL1 => "poll-max-us = 1000\n",
        }
    }

    /// Puts the figures into the group in which `qemu-scripts/bench.sh --json` reports them.
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

    /// Exits of the running guests so far; `None` if KVM does not count them.
    pub fn exits(self) -> Option<u64> {
        match self {
            Self::Tcg => None,
            Self::Kvm | Self::KvmInL1 => fs::read_to_string(EXITS).ok()?.trim().parse().ok(),
        }
    }

    /// The name of the fragment's file.
    pub fn fragment(self) -> &'static str {
        match self {
            Self::Tcg => "guest",
            Self::Kvm | Self::KvmInL1 => "guest-kvm",
        }
    }
}

/// Frequency of the time stamp counter, in kHz.
fn time_stamp_khz() -> u64 {
    let text = fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let line = text.lines().find(|line| line.starts_with("cpu MHz"));
    // The frequency is in MHz with three decimal places.
    let khz = line.and_then(|line| line.split(':').nth(1)?.trim().replace('.', "").parse().ok());
    khz.expect("the processor's frequency")
}

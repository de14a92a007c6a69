//! Figures in Prometheus' text format, version 0.0.4.

use std::fmt::{self, Display, Write};
use std::time::UNIX_EPOCH;

use super::figures::{AdoptionFigures, Figures, KindFigures};
use crate::process::sandbox::{FileRules, Protection};

/// The prefix of every metric name.
const PREFIX: &str = "vhost_device_iommu";

/// All figures, each labelled with the VM's name.
pub(super) fn render(figures: &Figures) -> String {
    let mut page = Page {
        out: String::new(),
        vm: figures.name.clone(),
    };
    // Writing to a string cannot fail.
    let _ = page.write_all(figures);
    page.out
}

struct Page {
    out: String,
    vm: String,
}

impl Page {
    fn write_all(&mut self, figures: &Figures) -> fmt::Result {
        self.head("info", "gauge", "The version of the daemon.")?;
        self.line("info", &[("version", &env!("CARGO_PKG_VERSION"))], 1)?;
        let since_epoch = figures.gathered_at.duration_since(UNIX_EPOCH);
        self.gauge(
            "updated_timestamp_seconds",
            "When the daemon gathered these figures, in seconds since 1970.",
            since_epoch.unwrap_or_default().as_secs(),
        )?;
        self.gauge(
            "connected",
            "Whether a VM is connected.",
            u64::from(figures.connected),
        )?;
        self.gauge(
            "driver_unknown",
            "Whether all endpoints are blocked: the domains of the guest's driver are unknown.",
            u64::from(figures.driver_unknown),
        )?;
        if let Some((state, checks)) = &figures.places {
            self.gauge(
                "places_wrong",
                "Whether endpoints are blocked: the guest numbers buses otherwise than its table, or it is not known.",
                u64::from(state.is_bad()),
            )?;
            self.counter(
                "place_checks_total",
                "Comparisons of the guest's bus numbers with its table.",
                *checks,
            )?;
        }
        self.gauge(
            "condemned_spaces",
            "Address spaces that the host has refused to destroy.",
            figures.condemned_spaces as u64,
        )?;
        self.state(figures)?;
        self.work(figures)?;
        self.faults(figures)?;
        self.devices(figures)?;
        self.limits(figures)?;
        self.counter(
            "log_messages_suppressed_total",
            "Log messages suppressed by a limit.",
            figures.log_suppressed,
        )?;
        self.counter(
            "log_messages_lost_total",
            "Log messages lost because nobody read standard error.",
            figures.log_lost,
        )?;
        self.sandbox(figures.sandbox)?;
        self.counter(
            "control_clients_cut_off_total",
            "Clients of the control and metrics sockets that got no answer.",
            figures.clients_cut_off,
        )
    }

    fn sandbox(&mut self, protection: Option<Protection>) -> fmt::Result {
        let name = "sandbox_enforced";
        self.head(name, "gauge", "Whether a part of the sandbox is in force.")?;
        let has_landlock = protection.is_some_and(|found| found.files != FileRules::Missing);
        for (part, is_enforced) in [
            ("filters", protection.is_some()),
            ("landlock", has_landlock),
        ] {
            self.line(name, &[("part", &part)], u64::from(is_enforced))?;
        }
        Ok(())
    }

    fn state(&mut self, figures: &Figures) -> fmt::Result {
        let totals = &figures.totals;
        self.gauge("domains", "Live domains.", totals.domains)?;
        self.gauge("mappings", "Live mappings.", totals.mappings)?;
        self.gauge(
            "mapped_bytes",
            "Bytes that live mappings cover.",
            totals.mapped_bytes,
        )?;
        self.gauge(
            "page_table_bytes",
            "Bytes of the page tables.",
            figures.tables.0,
        )?;
        self.head("endpoints", "gauge", "Endpoints, by state.")?;
        for (state, count) in [
            ("attached", totals.attached),
            ("quarantined", totals.quarantined),
        ] {
            self.line("endpoints", &[("state", &state)], count)?;
        }
        Ok(())
    }

    fn work(&mut self, figures: &Figures) -> fmt::Result {
        let name = "requests_total";
        self.head(name, "counter", "Answered requests, by type and status.")?;
        // Zeros, too: without them `increase()` would miss the first request of each status.
        for (kind, statuses) in &figures.requests {
            for (status, count) in statuses {
                let labels: [(&str, &dyn Display); 2] =
                    [("type", &kind.name()), ("status", &status.name())];
                self.line(name, &labels, *count)?;
            }
        }
        self.counter(
            "chains_refused_total",
            "Descriptor chains returned without an answer.",
            figures.chains_refused,
        )?;
        self.histogram(figures)?;
        let name = "host_map_failures_total";
        self.head(
            name,
            "counter",
            "Requests that failed in a backend, by type.",
        )?;
        for (kind, count) in &figures.backend_failures {
            self.line(name, &[("type", &kind.name())], *count)?;
        }
        self.counter(
            "wakeups_total",
            "Times a notification of the driver woke the worker.",
            figures.wakeups,
        )?;
        let name = "polls_total";
        self.head(
            name,
            "counter",
            "Times the worker polled the empty ring, by result.",
        )?;
        self.line(name, &[("result", &"paid")], figures.polls_paid)?;
        self.line(name, &[("result", &"unpaid")], figures.polls_unpaid)?;
        let name = "polls_paid_seconds_total";
        self.head(
            name,
            "counter",
            "Time of the polls during which requests came.",
        )?;
        self.line(name, &[], Seconds(figures.polls_paid_ns))?;
        self.counter(
            "connections_total",
            "VMMs that connected.",
            figures.connections,
        )?;
        let life = &figures.life;
        let name = "life";
        self.head(
            name,
            "gauge",
            "The number of this life of the daemon: one more each time a process takes the state of the one before over.",
        )?;
        self.line(name, &[("state", &life.inheritance.name())], life.number)?;
        let name = "life_kept";
        let meaning =
            "Whether the next process can go on where this one ends, with all open connections.";
        self.head(name, "gauge", meaning)?;
        self.line(name, &[], u8::from(life.kept))?;
        let name = "life_lost";
        self.head(name, "gauge", "Things that this life could not take over.")?;
        self.line(name, &[], life.lost.len())?;
        if let Some(after) = life.resumed_after {
            let name = "life_resumed_seconds";
            self.head(
                name,
                "gauge",
                "Time from the start of this process until the guest's requests were answered again.",
            )?;
            self.line(name, &[], after.as_secs_f64())?;
        }
        self.counter(
            "keeper_messages_total",
            "Messages to the process that keeps descriptors for the next daemon.",
            life.keeper_messages,
        )?;
        self.counter(
            "keeper_delays_total",
            "Times the VMM waited because it had changed its descriptors too often for the process that keeps them.",
            life.keeper_delays,
        )?;
        self.counter("resets_total", "Device resets.", figures.resets)?;
        self.counter(
            "needs_reset_total",
            "Times the driver made the virtio-pci device need a reset.",
            figures.needs_reset,
        )?;
        let name = "windows_unusable_total";
        self.head(
            name,
            "counter",
            "Windows of a vfio-user client that are no guest memory, by reason.",
        )?;
        self.line(name, &[("reason", &"refused")], figures.windows_refused)?;
        self.line(
            name,
            &[("reason", &"no-memory")],
            figures.windows_without_memory,
        )
    }

    fn histogram(&mut self, figures: &Figures) -> fmt::Result {
        let name = "batch_duration_seconds";
        self.head(
            name,
            "histogram",
            "Time from taking a batch of requests off the ring to returning the last one.",
        )?;
        let bucket = format!("{name}_bucket");
        let mut so_far = 0;
        for (bound, count) in &figures.batches {
            so_far += count;
            match bound {
                Some(ns) => self.line(&bucket, &[("le", &Seconds(*ns))], so_far)?,
                None => self.line(&bucket, &[("le", &"+Inf")], so_far)?,
            }
        }
        self.line(&format!("{name}_sum"), &[], Seconds(figures.batches_ns))?;
        self.line(&format!("{name}_count"), &[], so_far)
    }

    fn faults(&mut self, figures: &Figures) -> fmt::Result {
        let name = "faults_total";
        self.head(name, "counter", "Refused accesses, by reason.")?;
        for (reason, count) in &figures.faults {
            self.line(name, &[("reason", &reason.name())], *count)?;
        }
        self.counter(
            "faults_delivered_total",
            "Faults delivered to the guest.",
            figures.faults_delivered,
        )?;
        self.counter(
            "faults_dropped_total",
            "Faults dropped before they reached the guest.",
            figures.faults_dropped,
        )
    }

    fn devices(&mut self, figures: &Figures) -> fmt::Result {
        if let Some(readers) = &figures.readers {
            self.gauge(
                "readers",
                "Shadow readers that are registered.",
                readers.now,
            )?;
            self.counter(
                "readers_refused_often_total",
                "Processes that were refused as shadow readers because their endpoint had too many new ones.",
                readers.refused_often,
            )?;
            self.counter(
                "readers_killed_total",
                "Shadow readers that the daemon killed.",
                readers.killed,
            )?;
            self.counter(
                "readers_killed_slow_total",
                "Shadow readers that the daemon killed because they made requests wait too often.",
                readers.killed_slow,
            )?;
            self.counter(
                "readers_inherited_total",
                "Shadow readers whose connection outlived their process.",
                readers.inherited,
            )?;
        }
        if let Some(adoption) = &figures.adoption {
            self.adoption(adoption)?;
        }
        self.device_metrics(&figures.devices)
    }

    fn adoption(&mut self, adoption: &AdoptionFigures) -> fmt::Result {
        self.counter(
            "adoption_devices_total",
            "Devices that were taken over from a VMM.",
            adoption.taken,
        )?;
        self.counter(
            "adoption_requests_total",
            "Requests to the helper that takes devices over from the VMM.",
            adoption.requests,
        )?;
        self.counter(
            "adoption_refused_total",
            "Requests that the helper has refused or not answered.",
            adoption.refused,
        )?;
        self.counter(
            "adoption_limited_total",
            "Requests to the helper that were not made because too many came before.",
            adoption.limited,
        )?;
        let name = "adoption_waits_total";
        self.head(
            name,
            "counter",
            "Times the VMM or the guest waited for the helper, by result.",
        )?;
        let answered = adoption.waits.saturating_sub(adoption.late);
        self.line(name, &[("result", &"answered")], answered)?;
        self.line(name, &[("result", &"late")], adoption.late)
    }

    fn device_metrics(&mut self, kinds: &[KindFigures]) -> fmt::Result {
        for kind in kinds {
            let first = kind.devices.first();
            let shape = first.map(|(_, figures)| figures.as_slice());
            for (at, shape) in shape.unwrap_or_default().iter().enumerate() {
                let Some(metric) = shape.metric else { continue };
                self.head(metric.name, metric.metric_type, metric.help)?;
                for (endpoint, figures) in &kind.devices {
                    if let Some(figure) = figures.get(at) {
                        let value = figure.value.number();
                        self.line(metric.name, &[("endpoint", endpoint)], value)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn limits(&mut self, figures: &Figures) -> fmt::Result {
        self.head("limit", "gauge", "Limits of the configuration.")?;
        for limit in &figures.limits {
            self.line("limit", &[("limit", &limit.name)], limit.value)?;
        }
        self.head(
            "limit_used",
            "gauge",
            "The amount of a limit that is in use.",
        )?;
        for limit in &figures.limits {
            if let Some(used) = limit.used {
                self.line("limit_used", &[("limit", &limit.name)], used)?;
            }
        }
        self.head("limit_hits_total", "counter", "Times a limit was reached.")?;
        for limit in &figures.limits {
            self.line("limit_hits_total", &[("limit", &limit.name)], limit.hits)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.head(name, "gauge", help)?;
        self.line(name, &[], value)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.head(name, "counter", help)?;
        self.line(name, &[], value)
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) -> fmt::Result {
        writeln!(self.out, "# HELP {PREFIX}_{name} {help}")?;
        writeln!(self.out, "# TYPE {PREFIX}_{name} {kind}")
    }

    fn line(
        &mut self,
        name: &str,
        labels: &[(&str, &dyn Display)],
        value: impl Display,
    ) -> fmt::Result {
        write!(self.out, "{PREFIX}_{name}{{vm=\"{}\"", Escaped(&self.vm))?;
        for (label, text) in labels {
            write!(self.out, ",{label}=\"{text}\"")?;
        }
        writeln!(self.out, "}} {value}")
    }
}

/// The text of a label, escaped as the format has it.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

/// Nanoseconds, shown in seconds without rounding.
struct Seconds(u64);

impl Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1_000_000_000, self.0 % 1_000_000_000);
        let digits = format!("{rest:09}");
        match digits.trim_end_matches('0') {
            "" => write!(f, "{whole}"),
            digits => write!(f, "{whole}.{digits}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoints::status::{DeviceFigure, DeviceMetric};
    use crate::ids::EndpointId;
    use crate::topology::PciAddress;

    #[test]
    fn a_metric_of_a_device_has_a_line_for_each_endpoint() {
        const UP: DeviceMetric = DeviceMetric {
            name: "clock_up",
            metric_type: "gauge",
            help: "Whether a clock runs.",
        };
        let clock = |slot: u8, runs| {
            let endpoint = PciAddress::from_endpoint_id(EndpointId(u32::from(slot) << 3));
            let figures = vec![
                DeviceFigure::count("ticks", 7),
                DeviceFigure::flag("runs", runs).with_metric(&UP),
            ];
            (endpoint, figures)
        };
        let kinds = [
            KindFigures {
                list: "clocks",
                devices: vec![clock(4, true), clock(5, false)],
            },
            KindFigures {
                list: "idle",
                devices: Vec::new(),
            },
        ];
        let mut page = Page {
            out: String::new(),
            vm: "a".into(),
        };
        page.device_metrics(&kinds).expect("a string");
        assert_eq!(
            page.out,
            "# HELP vhost_device_iommu_clock_up Whether a clock runs.\n\
             # TYPE vhost_device_iommu_clock_up gauge\n\
             vhost_device_iommu_clock_up{vm=\"a\",endpoint=\"0000:00:04.0\"} 1\n\
             vhost_device_iommu_clock_up{vm=\"a\",endpoint=\"0000:00:05.0\"} 0\n"
        );
    }

    #[test]
    fn seconds_are_exact() {
        for (ns, text) in [
            (0, "0"),
            (1000, "0.000001"),
            (32_768_000, "0.032768"),
            (1_500_000_000, "1.5"),
            (u64::MAX, "18446744073.709551615"),
        ] {
            assert_eq!(Seconds(ns).to_string(), text);
        }
    }

    #[test]
    fn label_texts_are_escaped() {
        let name = "a\"b\\c\n";
        assert_eq!(Escaped(name).to_string(), "a\\\"b\\\\c\\n");
    }
}

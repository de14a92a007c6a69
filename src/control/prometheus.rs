//! Figures in Prometheus' text format, version 0.0.4.

use std::fmt::{self, Display, Write};

use super::figures::Figures;
use crate::topology::PciAddress;

/// What every name begins with.
const PREFIX: &str = "vhost_device_iommu";

/// All figures, each labelled with the VM's name.
pub(super) fn render(figures: &Figures) -> String {
    let mut page = Page {
        out: String::new(),
        vm: figures.name.clone(),
    };
    // Writing to a string cannot fail.
    let _ = page.all(figures);
    page.out
}

struct Page {
    out: String,
    vm: String,
}

impl Page {
    fn all(&mut self, figures: &Figures) -> fmt::Result {
        self.head("info", "gauge", "The version of the daemon.")?;
        self.line("info", &[("version", &env!("CARGO_PKG_VERSION"))], 1)?;
        self.gauge(
            "connected",
            "Whether a VM is connected.",
            u64::from(figures.connected),
        )?;
        self.state(figures)?;
        self.work(figures)?;
        self.faults(figures)?;
        self.devices(figures)?;
        self.limits(figures)?;
        self.counter(
            "log_messages_suppressed_total",
            "Messages that were not logged because there were too many.",
            figures.log_suppressed,
        )?;
        self.counter(
            "control_clients_cut_off_total",
            "Clients of the control and metrics sockets that got no answer.",
            figures.clients_cut_off,
        )
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
            "Memory of the page tables.",
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
        for (kind, statuses) in &figures.requests {
            for (status, count) in statuses {
                let labels: [(&str, &dyn Display); 2] =
                    [("type", &kind.name()), ("status", &status.name())];
                self.line(name, &labels, *count)?;
            }
        }
        self.counter(
            "chains_refused_total",
            "Descriptor chains that were returned unanswered.",
            figures.chains_refused,
        )?;
        self.histogram(figures)?;
        let name = "host_map_failures_total";
        self.head(name, "counter", "Requests that a backend failed, by type.")?;
        for (kind, count) in &figures.backend_failures {
            self.line(name, &[("type", &kind.name())], *count)?;
        }
        self.counter(
            "wakeups_total",
            "Times the worker was woken for requests.",
            figures.wakeups,
        )?;
        let name = "polls_total";
        self.head(
            name,
            "counter",
            "Times the worker looked at the empty ring, by result.",
        )?;
        self.line(name, &[("result", &"paid")], figures.polls_paid)?;
        self.line(name, &[("result", &"unpaid")], figures.polls_unpaid)?;
        let name = "polls_paid_seconds_total";
        self.head(name, "counter", "Time until requests came, where they did.")?;
        self.line(name, &[], Seconds(figures.polls_paid_ns))?;
        self.counter(
            "connections_total",
            "VMMs that connected.",
            figures.connections,
        )?;
        self.counter("resets_total", "Device resets.", figures.resets)
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
        self.head(
            name,
            "counter",
            "Refused accesses that were reported, by reason.",
        )?;
        for (reason, count) in &figures.faults {
            self.line(name, &[("reason", &reason.name())], *count)?;
        }
        self.counter(
            "faults_delivered_total",
            "Faults the guest was told of.",
            figures.faults_delivered,
        )?;
        self.counter(
            "faults_dropped_total",
            "Faults the guest was not told of.",
            figures.faults_dropped,
        )
    }

    fn devices(&mut self, figures: &Figures) -> fmt::Result {
        if let Some(readers) = &figures.readers {
            self.gauge(
                "readers",
                "Processes that follow the page tables.",
                readers.now,
            )?;
            self.counter(
                "readers_killed_total",
                "Such processes that were killed.",
                readers.killed,
            )?;
        }
        if !figures.emulated.is_empty() {
            self.head(
                "emulated_up",
                "gauge",
                "Whether an emulated device's server is there.",
            )?;
            for device in &figures.emulated {
                let endpoint = PciAddress::from_endpoint_id(device.endpoint);
                let up = u64::from(device.ends.server);
                self.line("emulated_up", &[("endpoint", &endpoint)], up)?;
            }
            let name = "emulated_refused_total";
            self.head(
                name,
                "counter",
                "Accesses of an emulated device that were refused.",
            )?;
            for device in &figures.emulated {
                let endpoint = PciAddress::from_endpoint_id(device.endpoint);
                self.line(name, &[("endpoint", &endpoint)], device.refused)?;
            }
        }
        if !figures.exports.is_empty() {
            self.head(
                "export_up",
                "gauge",
                "Whether an exported device has a client.",
            )?;
            for device in &figures.exports {
                let up = u64::from(device.connected);
                self.line("export_up", &[("endpoint", &device.endpoint)], up)?;
            }
        }
        Ok(())
    }

    fn limits(&mut self, figures: &Figures) -> fmt::Result {
        self.head("limit", "gauge", "What the configuration limits.")?;
        for limit in &figures.limits {
            self.line("limit", &[("limit", &limit.name)], limit.value)?;
        }
        self.head("limit_used", "gauge", "How much of a limit is in use.")?;
        for limit in &figures.limits {
            if let Some(used) = limit.used {
                self.line("limit_used", &[("limit", &limit.name)], used)?;
            }
        }
        self.head("limit_hits_total", "counter", "How often a limit was hit.")?;
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

/// A label's text.
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

/// Nanoseconds in seconds, exactly.
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
    fn a_name_ends_no_label() {
        let name = "a\"b\\c\n";
        assert_eq!(Escaped(name).to_string(), "a\\\"b\\\\c\\n");
    }
}

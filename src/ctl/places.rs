//! Whether the guest has the devices behind ports where its table has them, as text.

use std::fmt::{Result, Write};

use serde_json::Value;

use super::fields::{items, number, text};

/// Whether the guest has the devices behind ports where its table has them.
pub(super) fn render(out: &mut String, places: &Value) -> Result {
    match places["state"].as_str() {
        Some("agree") => writeln!(out, "ports: the guest numbers their buses as its table"),
        Some("unchecked") => writeln!(
            out,
            "ports: no driver has started since the bus numbers can be compared"
        ),
        Some("unknown") => writeln!(
            out,
            "ALL ENDPOINTS BEHIND PORTS ARE BLOCKED: their bus numbers are not known: {}",
            text(&places["why"])
        ),
        Some("differ") => {
            writeln!(
                out,
                "ENDPOINTS ARE BLOCKED: the guest numbers buses otherwise than its table; declare all ports (`[[port]]`)"
            )?;
            for port in items(&places["ports"]) {
                write!(
                    out,
                    "  port {}: bus {:02x}, in the guest ",
                    text(&port["port"]),
                    number(&port["bus"])
                )?;
                match port["guest_bus"].as_i64() {
                    Some(bus) => writeln!(out, "{bus:02x}")?,
                    None => writeln!(out, "no port")?,
                }
            }
            for device in items(&places["devices"]) {
                let found = device["guest_address"].as_str().unwrap_or("not there");
                let (id, address) = (text(&device["device"]), text(&device["address"]));
                writeln!(
                    out,
                    "  device {id}: endpoint {address}, in the guest {found}"
                )?;
            }
            Ok(())
        }
        Some(_) | None => Ok(()),
    }
}

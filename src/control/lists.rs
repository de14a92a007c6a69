//! Answers of any length.
//!
//! The control thread reads them from the core and writes them in pieces. It never locks the core for long or
//! while it waits for the client, and holds at most one piece in memory. All items of a piece are of the same
//! moment. An answer may or may not show a change between two pieces.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::answer::{VERSION, hex};
use super::subjects::{DeviceReports, Subjects};
use crate::address::{Iova, IovaRange, Mapping};
use crate::endpoints::kinds;
use crate::ids::{DomainId, EndpointId};
use crate::iommu::{Dma, EndpointState};
use crate::topology::PciAddress;

/// The most items that are read under one lock of the core.
const PIECE: usize = 512;
/// The time after which a piece ends early: reading mappings of many pages each takes long.
const PIECE_TIME: Duration = Duration::from_micros(50);
/// The most endpoints of a domain that are listed.
pub(super) const MAX_MEMBERS: usize = 256;

/// Writes all endpoints.
///
/// # Errors
/// The client does not read the answer.
pub(super) fn write_endpoints(out: &mut impl Write, subjects: &Subjects) -> io::Result<()> {
    let devices = &subjects.devices();
    write!(out, "{{\"version\":{VERSION},\"endpoints\":[")?;
    let mut comma = "";
    let mut next = Some(EndpointId(0));
    while let Some(from) = next {
        let piece: Vec<_> = {
            let iommu = subjects.iommu.lock();
            iommu.endpoints_from(from).take(PIECE).collect()
        };
        next = match piece.last() {
            Some(last) if piece.len() == PIECE => last.id.0.checked_add(1).map(EndpointId),
            Some(_) | None => None,
        };
        for state in &piece {
            write!(out, "{comma}{}", endpoint(state, devices))?;
            comma = ",";
        }
    }
    writeln!(out, "]}}")?;
    out.flush()
}

/// Writes all domains.
///
/// # Errors
/// The client does not read the answer.
pub(super) fn write_domains(out: &mut impl Write, subjects: &Subjects) -> io::Result<()> {
    write!(out, "{{\"version\":{VERSION},\"domains\":[")?;
    let mut comma = "";
    let mut next = Some(DomainId(0));
    while let Some(from) = next {
        let piece: Vec<_> = {
            let iommu = subjects.iommu.lock();
            iommu.domains_from(from).take(PIECE).collect()
        };
        next = match piece.last() {
            Some(last) if piece.len() == PIECE => last.id.0.checked_add(1).map(DomainId),
            Some(_) | None => None,
        };
        for domain in &piece {
            let members = domain.endpoints.iter().take(MAX_MEMBERS);
            let document = json!({
                "id": domain.id.0,
                "bypass": domain.bypass,
                "endpoint_count": domain.endpoints.len(),
                "endpoints": members.map(|e| e.0).collect::<Vec<_>>(),
                "mappings": domain.mappings,
                "mapped_bytes": domain.mapped_bytes,
            });
            write!(out, "{comma}{document}")?;
            comma = ",";
        }
    }
    writeln!(out, "]}}")?;
    out.flush()
}

/// Writes the mappings that share an address with `range`, of all domains or of `only` one.
///
/// # Errors
/// The client does not read the answer.
pub(super) fn write_mappings(
    out: &mut impl Write,
    subjects: &Subjects,
    only: Option<DomainId>,
    range: IovaRange,
) -> io::Result<()> {
    write!(out, "{{\"version\":{VERSION},\"domains\":[")?;
    let mut comma = "";
    let mut next = only.or(Some(DomainId(0)));
    while let Some(from) = next {
        let domain = match only {
            Some(id) => subjects.iommu.lock().has_domain(id).then_some(id),
            None => {
                let iommu = subjects.iommu.lock();
                iommu.domains_from(from).next().map(|d| d.id)
            }
        };
        let Some(id) = domain else { break };
        write!(out, "{comma}{{\"id\":{},\"mappings\":[", id.0)?;
        write_mappings_of(out, subjects, id, range)?;
        write!(out, "]}}")?;
        comma = ",";
        next = match only {
            Some(_) => None,
            None => id.0.checked_add(1).map(DomainId),
        };
    }
    writeln!(out, "]}}")?;
    out.flush()
}

fn write_mappings_of(
    out: &mut impl Write,
    subjects: &Subjects,
    domain: DomainId,
    range: IovaRange,
) -> io::Result<()> {
    let mut piece: Vec<Mapping> = Vec::with_capacity(PIECE);
    let mut next = Some(range);
    let mut comma = "";
    while let Some(rest) = next {
        piece.clear();
        {
            let iommu = subjects.iommu.lock();
            let began = Instant::now();
            for mapping in iommu.mappings_in(domain, rest) {
                piece.push(mapping);
                if piece.len() == PIECE || began.elapsed() > PIECE_TIME {
                    break;
                }
            }
        }
        // A full piece may be the last one: then the next one is empty.
        next = piece.last().and_then(|last| {
            let after = last.range.last().0.checked_add(1)?;
            IovaRange::new(Iova(after), range.last())
        });
        for mapping in &piece {
            write!(
                out,
                "{comma}{{\"first\":\"{:#x}\",\"last\":\"{:#x}\",\"gpa\":\"{:#x}\",\"access\":\"{}\",\
                 \"mmio\":{}}}",
                mapping.range.first().0,
                mapping.range.last().0,
                mapping.gpa.0,
                mapping.access,
                mapping.mmio
            )?;
            comma = ",";
        }
    }
    Ok(())
}

/// An endpoint, as in the answers to `status` and `endpoints`.
pub(super) fn endpoint(state: &EndpointState, devices: &DeviceReports) -> Value {
    let id = state.id;
    let device = devices.get(&id);
    let mut fields = json!({
        "id": id.0,
        "number": hex(id.0.into()),
        "address": PciAddress::from_endpoint_id(id).to_string(),
        "state": if state.quarantined {
            "quarantined"
        } else if state.misplaced {
            "misplaced"
        } else if state.domain.is_some() {
            "attached"
        } else {
            "unattached"
        },
        "dma": match state.dma {
            Dma::Translated => "translated",
            Dma::Bypass => "bypass",
            Dma::Blocked => "blocked",
        },
        "domain": state.domain.map(|d| d.0),
        "host": device.and_then(|device| device.host.as_ref()),
        "host_iommu": device.and_then(|device| device.host_iommu.as_ref()),
    });
    if let Some(file) = device.and_then(|device| device.vmm_file.as_ref()) {
        fields["taken_over"] = file.is_open().into();
    }
    for names in kinds::status_names() {
        let is_of_kind = device.is_some_and(|device| device.names == Some(names));
        fields[names.flag] = is_of_kind.into();
    }
    fields
}

//! The shadow readers of the daemon before: they read the page tables of that daemon.

use std::sync::Arc;
use std::time::Duration;

use log::error;

use crate::process::keeper::Keeper;
use crate::process::life::Life;
use crate::shadow::left::end_readers;
use crate::shadow::{Limits, Registry};

/// Ends the registrations of all readers of the daemon before. While one of them cannot be ended, `registry` fails what
/// depends on it. If its endpoint has no readers any more, no backend can do so: the log and `life` name it.
pub(super) fn end_left_readers(
    keeper: &Arc<Keeper>,
    patience: Duration,
    registry: Option<&Registry>,
    life: &Life,
) {
    if !keeper.is_present() {
        return;
    }
    let limits = Limits {
        patience,
        ..Limits::default()
    };
    let ended = end_readers(keeper, &limits);
    for endpoint in ended.unended() {
        if !registry.is_some_and(|registry| registry.serves(endpoint)) {
            let text = format!(
                "a shadow reader of endpoint {endpoint} may still use guest memory through the page tables of the daemon \
                 before, and cannot be killed; the endpoint has no shadow readers any more, so UNMAP does not wait for it: \
                 end that process"
            );
            error!("{text}");
            life.lose(text);
        }
    }
    if let Some(registry) = registry {
        registry.take_over(ended);
    }
}

//! Reasons to serve no new VMM.

use std::fmt;

use super::Device;

/// See [`Device::refuse_vmms`].
pub(super) struct VmmRefusal(Box<dyn Fn() -> Option<String> + Send + Sync>);

impl fmt::Debug for VmmRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VmmRefusal")
    }
}

impl Device {
    /// Has the transport refuse each new VMM while `reason` returns why. A VMM that is connected stays. `reason` may take
    /// seconds. Only the first call has an effect.
    pub fn refuse_vmms(&self, reason: impl Fn() -> Option<String> + Send + Sync + 'static) {
        // Fails if there is one.
        let _ = self.refusal.set(VmmRefusal(Box::new(reason)));
    }

    /// Why the transport must refuse a new VMM now, if it must.
    pub fn vmm_refusal(&self) -> Option<String> {
        self.refusal.get().and_then(|refusal| (refusal.0)())
    }
}

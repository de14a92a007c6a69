//! The status that a device in service reports, in one form for all kinds of endpoints. The control socket and the
//! metrics show every figure of a status without knowing the kind.

use std::sync::Arc;

use crate::host::sysfs::IommuInstance;
use crate::vfio::VmmCdev;

/// What the daemon reports of the device behind an endpoint.
#[derive(Clone)]
pub struct DeviceReport {
    /// The names under which answers report devices of its kind, if the kind has a status.
    pub names: Option<StatusNames>,
    /// The host's name of the device, if it is one of the host's.
    pub host: Option<String>,
    /// The host's IOMMU that translates for the device, if sysfs names it.
    pub host_iommu: Option<IommuInstance>,
    /// Reports its figures, if its kind has any.
    pub status: Option<Arc<dyn DeviceStatus>>,
    /// The open file of a device that the VMM brings.
    pub vmm_file: Option<VmmCdev>,
}

/// The names of the devices of one kind in the answers of the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusNames {
    /// The field of the answer to `stats` with the list of these devices.
    pub list: &'static str,
    /// The field of an endpoint that is true if a device of this kind is behind it.
    pub flag: &'static str,
}

/// A device in service that reports its status.
pub trait DeviceStatus: Send + Sync {
    /// The figures now. All devices of a kind have the same figures in the same order.
    fn figures(&self) -> Vec<DeviceFigure>;
}

/// One figure of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFigure {
    /// The field of the device's entry in the list.
    pub field: &'static str,
    /// Its value.
    pub value: FigureValue,
    /// The metric with the same value, labelled with the endpoint; `None` if no metric shows it.
    pub metric: Option<&'static DeviceMetric>,
}

/// The value of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FigureValue {
    /// A condition that holds now or does not.
    Flag(bool),
    /// An amount now, or a count since the daemon started.
    Count(u64),
}

/// A metric with a value for each device of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMetric {
    /// Its name without the daemon's prefix.
    pub name: &'static str,
    /// `gauge` or `counter`, as the format of Prometheus has it.
    pub metric_type: &'static str,
    /// One sentence.
    pub help: &'static str,
}

impl DeviceFigure {
    /// A condition.
    pub fn flag(field: &'static str, value: bool) -> Self {
        Self {
            field,
            value: FigureValue::Flag(value),
            metric: None,
        }
    }

    /// An amount or a count.
    pub fn count(field: &'static str, value: u64) -> Self {
        Self {
            field,
            value: FigureValue::Count(value),
            metric: None,
        }
    }

    /// The same figure, which `metric` shows too.
    #[must_use]
    pub fn with_metric(self, metric: &'static DeviceMetric) -> Self {
        Self {
            metric: Some(metric),
            ..self
        }
    }
}

impl FigureValue {
    /// The value of a metric: 1 for a condition that holds.
    pub fn number(self) -> u64 {
        match self {
            Self::Flag(holds) => holds.into(),
            Self::Count(count) => count,
        }
    }
}

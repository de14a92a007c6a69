//! Random requests and random deaths, also of the process that goes on.

use proptest::prelude::*;

use super::bed::{ALL, Bed, D1, D2, D3, Req, Step};
use super::model::Model;

fn req() -> impl Strategy<Value = Req> {
    let endpoint = prop::sample::select(ALL.to_vec());
    let domain = prop::sample::select(vec![D1, D2, D3]);
    // Some pages are in the next table.
    let pages = (500u64..530, 1u64..6);
    prop_oneof![
        3 => (endpoint.clone(), domain.clone(), prop::bool::weighted(0.1))
            .prop_map(|(e, d, b)| Req::Attach(e, d, b)),
        1 => (endpoint.clone(), domain.clone()).prop_map(|(e, d)| Req::Detach(e, d)),
        6 => (domain.clone(), pages.clone(), 0u64..64)
            .prop_map(|(d, (at, len), gpa)| Req::Map(d, at, len, gpa)),
        4 => (domain, pages).prop_map(|(d, (at, len))| Req::Unmap(d, at, len)),
        1 => endpoint.prop_map(Req::Probe),
        1 => Just(Req::Junk),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => prop::collection::vec(req(), 1..7).prop_map(Step::Batch),
        1 => any::<bool>().prop_map(Step::Bypass),
        1 => Just(Step::Reset),
        1 => Just(Step::ResetVm),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_deaths_leave_an_agreement(
        count in 0usize..3,
        batchers in 0u8..4,
        steps in prop::collection::vec((step(), 0u64..120, prop::collection::vec(0u64..400, 0..4)), 1..30),
        fail in prop::option::of(1u64..200),
    ) {
        let mut bed = Bed::new(count, batchers);
        let mut model = Model::default();
        if let Some(kernel) = bed.kernels.first() {
            kernel.lock().fail_call = fail;
        }
        for (step, at, later) in steps {
            let (mut lived, _) = bed.step(&step, at);
            let mut later = later.into_iter();
            while !lived {
                lived = bed.restore(later.next().unwrap_or(u64::MAX)).0;
            }
            if matches!(step, Step::Reset | Step::ResetVm) {
                model.reset();
            }
            bed.check(&mut model);
        }
    }
}

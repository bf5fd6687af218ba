//! `raymtls_tests::fuzz::proxy` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| raymtls_tests::fuzz::proxy(data));

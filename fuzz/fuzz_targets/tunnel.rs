//! `raymtls_tests::fuzz::tunnel` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| raymtls_tests::fuzz::tunnel(data));

//! What the allocator does with freed memory.

/// Keeps freed buffers of up to 32 MiB in the process for the next ones. Every operation writes a new buffer; given back and asked
/// for anew each time, a prompt of 512 tokens spent a seventh of its time in page faults. For programs, at their start; where
/// the C library is not glibc it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` takes two integers and is safe to call while other threads allocate.
    unsafe {
        // The largest glibc takes; also ends its own adaptation of both thresholds.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 << 20);
    }
}

// SPDX-License-Identifier: GPL-2.0

//! MMU notifiers: hear of every change to a process's page tables.
//!
//! May call C, which besides only `debugfs.rs` may. Everything but [`support`] is shaped to be
//! `rust/kernel/mm/mmu_notifier.rs`.
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

use core::{
    marker::{
        PhantomData,
        PhantomPinned, //
    },
    ops::Deref,
};
use kernel::{
    bindings,
    container_of,
    error::{
        to_result,
        VTABLE_DEFAULT_ERROR, //
    },
    mm::{
        Mm,
        MmWithUser, //
    },
    prelude::*,
    types::Opaque, //
};

/// A subscriber: what it does when the page tables of an address space change.
///
/// Each method that is implemented becomes a callback in the C table; the others stay null there,
/// which costs the notifying side nothing.
///
/// Methods run concurrently with each other and with themselves. Some callers hold spinlocks (the
/// page-table lock, for the young family) or the reverse-map locks, and memory reclaim is among
/// them, so unless a method says otherwise it must not sleep and must not allocate.
///
/// Not offered: `arch_invalidate_secondary_tlbs`. It is for hardware that walks the CPU's own page
/// tables, and the C side refuses (with a warning) a subscriber that has it beside
/// `invalidate_range_start` or `_end`.
#[vtable]
pub trait MmuNotifier: Send + Sync + 'static {
    /// The address space is being torn down, or this subscription is ending.
    ///
    /// Nothing may be accessed through it afterwards. May sleep. Can be called twice, at the same
    /// time, where both happen at once.
    fn release(&self, _mm: &Mm) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Tells whether a page of `start..end` was accessed, and forgets it, secondary TLBs included.
    fn clear_flush_young(&self, _mm: &Mm, _start: usize, _end: usize) -> bool {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// The same, where stale entries in secondary TLBs do no harm.
    fn clear_young(&self, _mm: &Mm, _start: usize, _end: usize) -> bool {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Tells whether the page at `address` was accessed, and changes nothing.
    fn test_young(&self, _mm: &Mm, _address: usize) -> bool {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Pages in the range are about to change. May sleep if [`Range::is_blockable`].
    ///
    /// It cannot fail: a C subscriber that can may not have `invalidate_range_end`.
    fn invalidate_range_start(&self, _range: &Range) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// The change announced by [`invalidate_range_start`](Self::invalidate_range_start) is over.
    /// May sleep if [`Range::is_blockable`].
    fn invalidate_range_end(&self, _range: &Range) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }

    /// Entries were made `PROT_NONE` to learn which node uses them. Between the start and the end
    /// of their range; the mmap lock is held for reading. May sleep.
    #[cfg(mmu_notifier_numa_protect)]
    fn numa_protect(&self, _hints: &NumaHints) {
        build_error!(VTABLE_DEFAULT_ERROR)
    }
}

/// What changes: wraps the kernel's `struct mmu_notifier_range`.
///
/// # Invariants
///
/// The C side does not write the range while it is shared.
#[repr(transparent)]
pub struct Range(Opaque<bindings::mmu_notifier_range>);

impl Range {
    /// # Safety
    ///
    /// `range` must be valid, and not written to, for `'a`.
    #[inline]
    unsafe fn from_raw<'a>(range: *const bindings::mmu_notifier_range) -> &'a Self {
        // INVARIANT: the caller promises it.
        // SAFETY: the caller promises that it is valid. Layouts agree due to `repr(transparent)`.
        unsafe { &*range.cast() }
    }

    #[inline]
    fn raw(&self) -> &bindings::mmu_notifier_range {
        // SAFETY: valid as `self` is, and not written to by the type invariant.
        unsafe { &*self.0.get() }
    }

    /// First address.
    #[inline]
    pub fn start(&self) -> usize {
        self.raw().start
    }

    /// First address after the range.
    #[inline]
    pub fn end(&self) -> usize {
        self.raw().end
    }

    /// Why: a value of `enum mmu_notifier_event`.
    #[inline]
    pub fn event(&self) -> u32 {
        self.raw().event
    }

    /// How: `MMU_NOTIFIER_RANGE_*` bits.
    #[inline]
    pub fn flags(&self) -> u32 {
        self.raw().flags
    }

    /// Whether the callback may sleep.
    #[inline]
    pub fn is_blockable(&self) -> bool {
        self.flags() & bindings::MMU_NOTIFIER_RANGE_BLOCKABLE != 0
    }
}

/// What a NUMA scan hinted: wraps the kernel's `struct mmu_notifier_numa_hints`.
///
/// # Invariants
///
/// The C side does not write the hints, nor the range that they point to, while they are shared.
#[cfg(mmu_notifier_numa_protect)]
#[repr(transparent)]
pub struct NumaHints(Opaque<bindings::mmu_notifier_numa_hints>);

#[cfg(mmu_notifier_numa_protect)]
impl NumaHints {
    /// # Safety
    ///
    /// `hints` and the range it points to must be valid, and not written to, for `'a`.
    #[inline]
    unsafe fn from_raw<'a>(hints: *const bindings::mmu_notifier_numa_hints) -> &'a Self {
        // INVARIANT: the caller promises it.
        // SAFETY: the caller promises that it is valid. Layouts agree due to `repr(transparent)`.
        unsafe { &*hints.cast() }
    }

    #[inline]
    fn raw(&self) -> &bindings::mmu_notifier_numa_hints {
        // SAFETY: valid as `self` is, and not written to by the type invariant.
        unsafe { &*self.0.get() }
    }

    /// The range that the scan announced.
    #[inline]
    pub fn range(&self) -> &Range {
        // SAFETY: by the type invariant, valid as long as `self` is.
        unsafe { Range::from_raw(self.raw().range) }
    }

    /// Number of entries, in base pages, that this scan made `PROT_NONE`.
    #[inline]
    pub fn nr_pages(&self) -> usize {
        self.raw().nr_pages
    }

    /// The stretches, as `(start, end)`: sorted, disjoint and page-aligned. Together they cover
    /// every entry counted in [`nr_pages`](Self::nr_pages), and none that is still accessible.
    pub fn stretches(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut stretch = (0, 0);

        core::iter::from_fn(move || {
            let (start, end) = &mut stretch;
            // SAFETY: the hints are valid by the type invariant, the results are ours to write.
            unsafe { bindings::mmu_notifier_numa_hints_next(self.0.get(), start, end) }
                .then_some(stretch)
        })
    }
}

/// A subscription: while it lives, `T` hears of the changes to one address space.
///
/// It keeps the `mm_struct`, but not the address space: when the last user exits, `T` hears
/// `release`, and nothing from then on.
///
/// Dropping it waits for callbacks that are running. So it must not be dropped in a callback, nor
/// with a lock held that a callback takes.
///
/// # Examples
///
/// Counts the changes to the address space of the running process:
///
/// ```
/// # use kernel::{current, mm::{mmu_notifier::{MmuNotifier, Range, Registration}, MmWithUser}};
/// use kernel::sync::atomic::{Atomic, Relaxed};
///
/// struct Changes(Atomic<u64>);
///
/// #[vtable]
/// impl MmuNotifier for Changes {
///     fn invalidate_range_start(&self, _range: &Range) {
///         self.0.add(1, Relaxed);
///     }
/// }
///
/// fn watch(mm: &MmWithUser) -> Result<Pin<KBox<Registration<Changes>>>> {
///     KBox::pin_init(Registration::new(mm, Ok(Changes(Atomic::new(0)))), GFP_KERNEL)
/// }
///
/// // None in a kernel thread.
/// if let Some(mm) = current!().mm() {
///     let registration = watch(mm)?;
///     pr_info!("{} changes so far\n", registration.0.load(Relaxed));
/// }
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `subscription` is registered, with the callbacks of [`Vtable<T>`], and `data` is initialized and
/// pinned for as long.
#[pin_data(PinnedDrop)]
pub struct Registration<T: MmuNotifier> {
    #[pin]
    data: T,
    #[pin]
    subscription: Opaque<bindings::mmu_notifier>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: a subscription may be ended on another thread than it was made on.
unsafe impl<T: MmuNotifier> Send for Registration<T> {}
// SAFETY: shared references only give access to `data`, which is `Sync`, and to fields of the
// subscription that do not change while it is registered.
unsafe impl<T: MmuNotifier> Sync for Registration<T> {}

impl<T: MmuNotifier> Registration<T> {
    /// Subscribes `data` to the changes of `mm`.
    ///
    /// Takes the mmap lock for writing and sleeps: hold no lock that is taken inside it. `data` is
    /// called from here on, maybe before this returns.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `EINTR` when a signal comes while all locks of `mm` are being taken.
    pub fn new<'a>(
        mm: &'a MmWithUser,
        data: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        try_pin_init!(Self {
            data <- data,
            // INVARIANT: registered where this succeeds; `data`, the field before, is initialized.
            subscription <- Opaque::try_ffi_init(|slot: *mut bindings::mmu_notifier| {
                // SAFETY: `slot` is valid for writing; all-zero is a `struct mmu_notifier`.
                unsafe { slot.write(pin_init::zeroed()) };
                // SAFETY: as above. Nobody else knows of it yet.
                unsafe { (*slot).ops = &Vtable::<T>::OPS };
                // SAFETY: the subscription is zeroed but for its callbacks. It stays where it is
                // until `drop` unregisters it, as it is pinned. `mm` has users by its type.
                to_result(unsafe { bindings::mmu_notifier_register(slot, mm.as_raw()) })
            }),
            _pin: PhantomPinned,
        })
    }

    /// The address space, which may have lost its last user since.
    #[inline]
    pub fn mm(&self) -> &Mm {
        // SAFETY: by the type invariant it is registered. Then the field is set, does not change,
        // and holds a reference on the `mm_struct`.
        unsafe { Mm::from_raw((*self.subscription.get()).mm) }
    }
}

impl<T: MmuNotifier> Deref for Registration<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.data
    }
}

#[pinned_drop]
impl<T: MmuNotifier> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        let mm = self.mm().as_raw();
        // SAFETY: registered, by the type invariant, on this `mm`. When this returns no callback
        // runs and none will, so that `data` can go.
        unsafe { bindings::mmu_notifier_unregister(self.subscription.get(), mm) };
    }
}

/// The C callbacks of a subscriber.
struct Vtable<T>(PhantomData<T>);

impl<T: MmuNotifier> Vtable<T> {
    const OPS: bindings::mmu_notifier_ops = bindings::mmu_notifier_ops {
        release: if T::HAS_RELEASE {
            Some(Self::release)
        } else {
            None
        },
        clear_flush_young: if T::HAS_CLEAR_FLUSH_YOUNG {
            Some(Self::clear_flush_young)
        } else {
            None
        },
        clear_young: if T::HAS_CLEAR_YOUNG {
            Some(Self::clear_young)
        } else {
            None
        },
        test_young: if T::HAS_TEST_YOUNG {
            Some(Self::test_young)
        } else {
            None
        },
        invalidate_range_start: if T::HAS_INVALIDATE_RANGE_START {
            Some(Self::invalidate_range_start)
        } else {
            None
        },
        invalidate_range_end: if T::HAS_INVALIDATE_RANGE_END {
            Some(Self::invalidate_range_end)
        } else {
            None
        },
        #[cfg(mmu_notifier_numa_protect)]
        numa_protect: if T::HAS_NUMA_PROTECT {
            Some(Self::numa_protect)
        } else {
            None
        },
        ..pin_init::zeroed()
    };

    /// # Safety
    ///
    /// `subscription` must be that of a [`Registration<T>`] that is registered for `'a`.
    unsafe fn data<'a>(subscription: *mut bindings::mmu_notifier) -> &'a T {
        let subscription = Opaque::cast_from(subscription);
        // SAFETY: the caller promises that it is this field of a `Registration<T>`.
        let registration = unsafe { container_of!(subscription, Registration<T>, subscription) };
        // SAFETY: by the invariant of `Registration`, `data` is initialized while it is
        // registered. Only `data` is borrowed: the other fields may still be in the making.
        unsafe { &(*registration).data }
    }

    /// # Safety
    ///
    /// To be called by the C side alone, as `mmu_notifier_ops::release`.
    unsafe extern "C" fn release(
        subscription: *mut bindings::mmu_notifier,
        mm: *mut bindings::mm_struct,
    ) {
        // SAFETY: the C side passes a subscription that has these callbacks, and unregistering
        // waits for this function to return.
        let data = unsafe { Self::data(subscription) };
        // SAFETY: the subscription holds a reference on `mm`.
        data.release(unsafe { Mm::from_raw(mm) });
    }

    /// # Safety
    ///
    /// To be called by the C side alone, as `mmu_notifier_ops::clear_flush_young`.
    unsafe extern "C" fn clear_flush_young(
        subscription: *mut bindings::mmu_notifier,
        mm: *mut bindings::mm_struct,
        start: usize,
        end: usize,
    ) -> bool {
        // SAFETY: as in `release`.
        let data = unsafe { Self::data(subscription) };
        // SAFETY: the subscription holds a reference on `mm`.
        data.clear_flush_young(unsafe { Mm::from_raw(mm) }, start, end)
    }

    /// # Safety
    ///
    /// To be called by the C side alone, as `mmu_notifier_ops::clear_young`.
    unsafe extern "C" fn clear_young(
        subscription: *mut bindings::mmu_notifier,
        mm: *mut bindings::mm_struct,
        start: usize,
        end: usize,
    ) -> bool {
        // SAFETY: as in `release`.
        let data = unsafe { Self::data(subscription) };
        // SAFETY: the subscription holds a reference on `mm`.
        data.clear_young(unsafe { Mm::from_raw(mm) }, start, end)
    }

    /// # Safety
    ///
    /// To be called by the C side alone, as `mmu_notifier_ops::test_young`.
    unsafe extern "C" fn test_young(
        subscription: *mut bindings::mmu_notifier,
        mm: *mut bindings::mm_struct,
        address: usize,
    ) -> bool {
        // SAFETY: as in `release`.
        let data = unsafe { Self::data(subscription) };
        // SAFETY: the subscription holds a reference on `mm`.
        data.test_young(unsafe { Mm::from_raw(mm) }, address)
    }

    /// # Safety
    ///
    /// To be called by the C side alone, as `mmu_notifier_ops::invalidate_range_start`.
    unsafe extern "C" fn invalidate_range_start(
        subscription: *mut bindings::mmu_notifier,
        range: *const bindings::mmu_notifier_range,
    ) -> c_int {
        // SAFETY: as in `release`.
        let data = unsafe { Self::data(subscription) };
        // SAFETY: the C side passes a range that is valid, and that it does not write, meanwhile.
        data.invalidate_range_start(unsafe { Range::from_raw(range) });
        0
    }

    /// # Safety
    ///
    /// To be called by the C side alone, as `mmu_notifier_ops::invalidate_range_end`.
    unsafe extern "C" fn invalidate_range_end(
        subscription: *mut bindings::mmu_notifier,
        range: *const bindings::mmu_notifier_range,
    ) {
        // SAFETY: as in `release`.
        let data = unsafe { Self::data(subscription) };
        // SAFETY: the C side passes a range that is valid, and that it does not write, meanwhile.
        data.invalidate_range_end(unsafe { Range::from_raw(range) });
    }

    /// # Safety
    ///
    /// To be called by the C side alone, as `mmu_notifier_ops::numa_protect`.
    #[cfg(mmu_notifier_numa_protect)]
    unsafe extern "C" fn numa_protect(
        subscription: *mut bindings::mmu_notifier,
        hints: *const bindings::mmu_notifier_numa_hints,
    ) {
        // SAFETY: as in `release`.
        let data = unsafe { Self::data(subscription) };
        // SAFETY: the C side passes hints, with a range, that are valid and that it does not
        // write meanwhile.
        data.numa_protect(unsafe { NumaHints::from_raw(hints) });
    }
}

/// What else the recorder needs of the kernel and finds no safe function for in Linux 7.3; each of
/// these would go to the file of `rust/kernel` that its text names.
pub mod support {
    use core::ptr::NonNull;
    use kernel::{
        bindings,
        mm::MmWithUser,
        prelude::*,
        sync::aref::ARef,
        task::{
            Pid,
            Task, //
        }, //
    };

    /// The address space of the thread or process that is `pid` in the caller's pid namespace
    /// (`task.rs`).
    ///
    /// # Errors
    ///
    /// `ESRCH`: there is none, or it has exited. `EINVAL`: a kernel thread, without address space.
    pub fn mm_of_vpid(pid: Pid) -> Result<ARef<MmWithUser>> {
        // SAFETY: safe to call with any number in process context; returns null or a reference.
        let found = unsafe { bindings::find_get_pid(pid) };
        // SAFETY: null is allowed, else it is the reference taken above. Returns the same.
        let task = unsafe { bindings::get_pid_task(found, bindings::pid_type_PIDTYPE_PID) };
        // SAFETY: gives the reference back; null is allowed.
        unsafe { bindings::put_pid(found) };

        let task = NonNull::new(task.cast::<Task>()).ok_or(ESRCH)?;
        // SAFETY: `get_pid_task()` gave a reference, which is handed over.
        let task = unsafe { ARef::from_raw(task) };

        // SAFETY: the task is valid. Returns null or a reference on the users of an `mm_struct`.
        let mm = unsafe { bindings::get_task_mm(task.as_ptr()) };
        match NonNull::new(mm.cast::<MmWithUser>()) {
            // SAFETY: the reference from `get_task_mm()` is handed over.
            Some(mm) => Ok(unsafe { ARef::from_raw(mm) }),
            None if is_kernel_thread(&task) => Err(EINVAL),
            None => Err(ESRCH),
        }
    }

    fn is_kernel_thread(task: &Task) -> bool {
        // SAFETY: the task is valid. Other bits of the word may change meanwhile, by marked or
        // plain stores of its own; the one that is looked at is set for good before it runs.
        let flags = unsafe { (&raw const (*task.as_ptr()).flags).read_volatile() };
        flags & bindings::PF_KTHREAD != 0
    }

    /// The name of the running thread, padded with zeroes (`task.rs`).
    pub fn current_comm() -> [u8; 16] {
        // SAFETY: `current` is valid. Only the task itself and `prctl()`-like writers of the same
        // process write the name, always with a zero at its end; who reads meanwhile gets parts of
        // both, as `get_task_comm()` users do.
        unsafe {
            (&raw const (*Task::current_raw()).comm)
                .cast::<[u8; 16]>()
                .read_volatile()
        }
    }

    /// `CLOCK_MONOTONIC` in nanoseconds: never goes back, not from one CPU to another either
    /// (`time.rs`, where it is private to the crate).
    pub fn monotonic_ns() -> u64 {
        // SAFETY: safe to call but in an NMI, and there are no notifiers in one.
        unsafe { bindings::ktime_get() as u64 }
    }

    /// An estimate of the memory that can be had without swapping, in bytes (`mm.rs`).
    pub fn available_bytes() -> u64 {
        // SAFETY: safe to call from any context. Negative where memory is below the reserves.
        let pages = unsafe { bindings::si_mem_available() };

        u64::try_from(pages).unwrap_or(0) << kernel::page::PAGE_SHIFT
    }
}

#[kunit_tests(mmu_notifier)]
mod tests {
    use super::*;
    use core::ptr;
    use kernel::{
        current,
        page::PAGE_SIZE,
        sync::{
            aref::ARef,
            atomic::{
                Atomic,
                Relaxed, //
            },
            Arc, //
        },
    };

    /// What a subscriber heard.
    struct Heard {
        starts: Atomic<u64>,
        ends: Atomic<u64>,
        releases: Atomic<u64>,
        /// Of the last start.
        range: [Atomic<usize>; 2],
    }

    impl Heard {
        fn counts(&self) -> [u64; 3] {
            [&self.starts, &self.ends, &self.releases].map(|count| count.load(Relaxed))
        }
    }

    struct Listener(Arc<Heard>);

    type Listening = (Pin<KBox<Registration<Listener>>>, Arc<Heard>);

    #[vtable]
    impl MmuNotifier for Listener {
        fn release(&self, _mm: &Mm) {
            self.0.releases.add(1, Relaxed);
        }

        fn invalidate_range_start(&self, range: &Range) {
            self.0.range[0].store(range.start(), Relaxed);
            self.0.range[1].store(range.end(), Relaxed);
            self.0.starts.add(1, Relaxed);
        }

        fn invalidate_range_end(&self, _range: &Range) {
            self.0.ends.add(1, Relaxed);
        }
    }

    /// The address space of the thread that runs a test, which nobody else uses.
    struct Attached(ARef<MmWithUser>);

    impl Attached {
        fn new() -> Result<Self> {
            // SAFETY: runs in a thread of KUnit's, as it demands.
            to_result(unsafe { bindings::kunit_attach_mm() })?;
            let current = current!();
            current.mm().map(|mm| Self(ARef::from(mm))).ok_or(ESRCH)
        }
    }

    impl Deref for Attached {
        type Target = MmWithUser;

        fn deref(&self) -> &MmWithUser {
            &self.0
        }
    }

    impl Drop for Attached {
        fn drop(&mut self) {
            // SAFETY: `kunit_attach_mm()` made this thread use it. What it leaves to the end of the
            // thread does not give it back.
            unsafe { bindings::kthread_unuse_mm(self.0.as_raw()) };
            // SAFETY: the reference with which it was made; this has another one.
            unsafe { bindings::mmput(self.0.as_raw()) };
        }
    }

    /// A subscription to it, and what comes of it.
    fn listen(mm: &MmWithUser) -> Result<Listening> {
        let count = || Atomic::new(0);
        let heard = Heard {
            starts: count(),
            ends: count(),
            releases: count(),
            range: [Atomic::new(0), Atomic::new(0)],
        };
        let heard = Arc::new(heard, GFP_KERNEL)?;
        let registration = Registration::new(mm, Ok(Listener(heard.clone())));

        Ok((KBox::pin_init(registration, GFP_KERNEL)?, heard))
    }

    /// Maps a page and unmaps it, which subscribers hear of; returns its address.
    fn unmap_page() -> Result<usize> {
        /// `MAP_PRIVATE | MAP_ANONYMOUS` on most architectures; bindgen does not see them.
        const FLAGS: usize = 0x22;

        // SAFETY: a new mapping in an address space that nobody else uses. No file is needed for it.
        let start = unsafe { bindings::vm_mmap(ptr::null_mut(), 0, PAGE_SIZE, 0, FLAGS, 0) };
        // SAFETY: nobody refers to the mapping. A `start` that is an error is refused.
        to_result(unsafe { bindings::vm_munmap(start, PAGE_SIZE) })?;
        Ok(start)
    }

    #[test]
    fn hears_of_a_change() -> Result {
        let mm = Attached::new()?;
        let (_registration, heard) = listen(&mm)?;
        let start = unmap_page()?;

        assert_eq!(heard.counts(), [1, 1, 0]);
        let range = [&heard.range[0], &heard.range[1]].map(|one| one.load(Relaxed));
        assert!(range[0] <= start && start + PAGE_SIZE <= range[1]);
        Ok(())
    }

    #[test]
    fn hears_nothing_once_dropped() -> Result {
        let mm = Attached::new()?;
        let (registration, heard) = listen(&mm)?;

        drop(registration);
        assert_eq!(heard.counts(), [0, 0, 1]);
        unmap_page()?;
        assert_eq!(heard.counts(), [0, 0, 1]);
        // And the subscriber is gone.
        assert!(Arc::into_unique_or_drop(heard).is_some());
        Ok(())
    }

    #[test]
    fn two_hear_the_same() -> Result {
        let mm = Attached::new()?;
        let (first, heard_first) = listen(&mm)?;
        let (_second, heard_second) = listen(&mm)?;

        unmap_page()?;
        drop(first);
        unmap_page()?;
        assert_eq!(heard_first.counts(), [1, 1, 1]);
        assert_eq!(heard_second.counts(), [2, 2, 0]);
        Ok(())
    }

    #[test]
    fn knows_its_address_space() -> Result {
        let mm = Attached::new()?;
        let (registration, _heard) = listen(&mm)?;

        assert!(ptr::eq(registration.mm().as_raw(), mm.as_raw()));
        Ok(())
    }

    #[test]
    fn fails_with_its_data() -> Result {
        let mm = Attached::new()?;
        let registration = Registration::<Listener>::new(&mm, Err::<Listener, _>(EDOM));

        assert!(KBox::pin_init(registration, GFP_KERNEL).err() == Some(EDOM));
        // Nothing is left that would be called.
        unmap_page()?;
        Ok(())
    }

    #[test]
    fn what_is_not_implemented_is_null() {
        let callbacks = Vtable::<Listener>::OPS;

        assert!(callbacks.invalidate_range_start.is_some());
        assert!(callbacks.clear_flush_young.is_none());
        assert!(callbacks.clear_young.is_none());
        assert!(callbacks.test_young.is_none());
        #[cfg(mmu_notifier_numa_protect)]
        assert!(callbacks.numa_protect.is_none());
    }
}

// SPDX-License-Identifier: GPL-2.0

//! debugfs files that hold the module which serves them. May call C, as `mmu_notifier.rs` may.
//!
//! A part of `kernel::debugfs`, under the same names, with one difference: the file operations have
//! an owner. Those of Linux 7.3 have none, so that a module can be unloaded while a file of it is
//! open, and closing that file then reads the operations in memory that is gone. Where the kernel
//! sets the owner, this file can be dropped for `use kernel::debugfs`.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

use core::{
    marker::{
        PhantomData,
        PhantomPinned, //
    },
    ptr,
};
use kernel::{
    bindings,
    debugfs::{
        BinaryReader,
        BinaryWriter, //
    },
    fs::file,
    prelude::*,
    sync::Arc,
    types::ForeignOwnable,
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceWriter, //
    },
};

/// A directory or file, which goes, with all that is in it, when this is dropped.
///
/// # Invariants
///
/// `dentry` is owned, or null or an error, which the C side takes everywhere for a directory or
/// file that could not be made; its parent lives.
struct Entry {
    dentry: *mut bindings::dentry,
    _parent: Option<Arc<Entry>>,
}

// SAFETY: entries may be used and removed from any thread.
unsafe impl Send for Entry {}
// SAFETY: a shared reference only gives the pointer, which the C side may use concurrently.
unsafe impl Sync for Entry {}

impl Entry {
    fn dir(name: &CStr, parent: Option<Arc<Entry>>) -> Self {
        let dentry = parent.as_ref().map_or(ptr::null_mut(), |dir| dir.dentry);
        // INVARIANT: the result is owned, null or an error, and the parent is held.
        // SAFETY: `name` is a string, and the parent is as the type invariant says, or null.
        let dentry = unsafe { bindings::debugfs_create_dir(name.as_char_ptr(), dentry) };

        Self {
            dentry,
            _parent: parent,
        }
    }

    /// # Safety
    ///
    /// `data` must live until the returned entry is dropped, and `operations` must take the private
    /// data of the file for a `T`.
    unsafe fn file<T: Sync>(
        name: &CStr,
        mode: u16,
        parent: Arc<Entry>,
        data: &T,
        operations: &'static bindings::file_operations,
    ) -> Self {
        // INVARIANT: the result is owned, null or an error, and the parent is held.
        // SAFETY: `name` is a string, the parent as the type invariant says, and the caller
        // promises the rest.
        let dentry = unsafe {
            bindings::debugfs_create_file_full(
                name.as_char_ptr(),
                mode,
                parent.dentry,
                ptr::from_ref(data).cast_mut().cast(),
                ptr::null(),
                operations,
            )
        };

        Self {
            dentry,
            _parent: Some(parent),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // SAFETY: owned, null or an error by the type invariant; a parent is not gone before, so
        // neither is this. Waits for calls into the files that are running, and allows no more.
        unsafe { bindings::debugfs_remove(self.dentry) };
    }
}

/// A directory, which stays while it, or a file or directory in it, is held.
///
/// That one could not be made is not reported, as everywhere in debugfs.
#[derive(Clone)]
pub struct Dir(Arc<Entry>);

impl Dir {
    /// Makes a directory at the root of debugfs.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, for the handle.
    pub fn new(name: &CStr) -> Result<Self> {
        Ok(Self(Arc::new(Entry::dir(name, None), GFP_KERNEL)?))
    }

    /// Makes a directory in this one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, for the handle.
    pub fn subdir(&self, name: &CStr) -> Result<Self> {
        let entry = Entry::dir(name, Some(self.0.clone()));
        Ok(Self(Arc::new(entry, GFP_KERNEL)?))
    }

    /// Makes a file that its owner can read, mode 0400.
    pub fn read_binary_file<'a, T>(
        &'a self,
        name: &'a CStr,
        data: T,
    ) -> impl PinInit<File<T>, Error> + 'a
    where
        T: BinaryWriter + Send + Sync + 'static,
    {
        File::new(self, name, 0o400, data, &Operations::<T>::READ)
    }

    /// Makes a file that its owner can read, mode 0400, and that shows each who opens it something of
    /// his own, from beginning to end.
    pub fn read_stream<'a, T>(
        &'a self,
        name: &'a CStr,
        data: T,
    ) -> impl PinInit<File<T>, Error> + 'a
    where
        T: Open + Send + Sync + 'static,
    {
        File::new(self, name, 0o400, data, &Operations::<T>::STREAM)
    }

    /// Makes such a file that its owner can write, too, mode 0600.
    pub fn read_write_stream<'a, T>(
        &'a self,
        name: &'a CStr,
        data: T,
    ) -> impl PinInit<File<T>, Error> + 'a
    where
        T: Open + BinaryReader + Send + Sync + 'static,
    {
        File::new(self, name, 0o600, data, &Operations::<T>::STREAM_AND_WRITE)
    }

    /// Makes a file that its owner can write, mode 0200.
    pub fn write_binary_file<'a, T>(
        &'a self,
        name: &'a CStr,
        data: T,
    ) -> impl PinInit<File<T>, Error> + 'a
    where
        T: BinaryReader + Send + Sync + 'static,
    {
        File::new(self, name, 0o200, data, &Operations::<T>::WRITE)
    }
}

/// What a file shows that is read from beginning to end, see [`Dir::read_stream`]. Not in
/// `kernel::debugfs` of Linux 7.3, where a file knows no more of its reader than the position.
pub trait Open {
    /// What is kept for who has it open. It may outlive the file.
    type Stream: Stream;

    /// Is called when the file is opened.
    fn open(&self) -> Result<Pin<KBox<Self::Stream>>>;
}

/// An open file that is read from beginning to end. Several threads may read it at once.
pub trait Stream: Send + Sync + 'static {
    /// Writes what comes next, as much as there is room for. Returns the number of bytes, 0 at the end.
    fn read(&self, writer: &mut UserSliceWriter) -> Result<usize>;
}

/// A file, and what it shows.
#[pin_data]
pub struct File<T> {
    // First, so that the file is gone before the data is dropped.
    entry: Entry,
    data: T,
    #[pin]
    _pin: PhantomPinned,
}

impl<T: Send + Sync + 'static> File<T> {
    fn new<'a>(
        dir: &'a Dir,
        name: &'a CStr,
        mode: u16,
        data: T,
        operations: &'static bindings::file_operations,
    ) -> impl PinInit<Self, Error> + 'a {
        try_pin_init!(Self {
            data,
            // SAFETY: the data is pinned, and dropped after the entry. The operations are those
            // for a `T`.
            entry: unsafe { Entry::file(name, mode, dir.0.clone(), &*data, operations) },
            _pin: PhantomPinned,
        })
    }
}

/// This module. Linux 7.3 has `this_module()` for it, 7.2 has not.
const THIS_MODULE: *mut bindings::module = &raw mut bindings::__this_module;

/// The file operations of a file that shows a `T`.
struct Operations<T>(PhantomData<T>);

impl<T> Operations<T> {
    const COMMON: bindings::file_operations = bindings::file_operations {
        owner: THIS_MODULE,
        open: Some(bindings::simple_open),
        llseek: Some(bindings::default_llseek),
        ..pin_init::zeroed()
    };
}

impl<T: BinaryWriter + Sync> Operations<T> {
    const READ: bindings::file_operations = bindings::file_operations {
        read: Some(Self::read),
        ..Self::COMMON
    };

    /// # Safety
    ///
    /// To be called by the VFS alone, on a file whose private data is a `T`.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        buffer: *mut c_char,
        count: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: `simple_open()` put the private data of the inode there, a `T` that lives until
        // the file is removed, which waits for this call.
        let data = unsafe { &*(*file).private_data.cast::<T>() };
        // SAFETY: the VFS passes a position that is ours to change.
        let position: &mut file::Offset = unsafe { &mut *position };
        let mut writer = UserSlice::new(UserPtr::from_ptr(buffer.cast()), count).writer();

        as_count(data.write_to_slice(&mut writer, position))
    }
}

impl<T: Open + Sync> Operations<T> {
    const STREAM: bindings::file_operations = bindings::file_operations {
        open: Some(Self::open_stream),
        read: Some(Self::read_stream),
        release: Some(Self::release_stream),
        llseek: None,
        ..Self::COMMON
    };

    /// # Safety
    ///
    /// To be called by the VFS alone, on a file whose inode has a `T` for its private data.
    unsafe extern "C" fn open_stream(
        inode: *mut bindings::inode,
        file: *mut bindings::file,
    ) -> c_int {
        // SAFETY: the inode's private data is a `T` that lives until the file is removed, which
        // waits for this call.
        let data = unsafe { &*(*inode).i_private.cast::<T>() };
        let stream = match data.open() {
            Ok(stream) => stream.into_foreign(),
            Err(error) => return error.to_errno(),
        };
        // SAFETY: the file is being opened, and nobody else knows it yet.
        unsafe { (*file).private_data = stream };
        // SAFETY: called as an `open` of its own would be. Always returns 0.
        unsafe { bindings::nonseekable_open(inode, file) }
    }

    /// # Safety
    ///
    /// To be called by the VFS alone, on a file that `open_stream()` opened.
    unsafe extern "C" fn read_stream(
        file: *mut bindings::file,
        buffer: *mut c_char,
        count: usize,
        _position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: `open_stream()` put it there, and it stays until the last user of the file is gone.
        let stream = unsafe { Pin::<KBox<T::Stream>>::borrow((*file).private_data) };
        let mut writer = UserSlice::new(UserPtr::from_ptr(buffer.cast()), count).writer();

        as_count(stream.read(&mut writer))
    }

    /// # Safety
    ///
    /// To be called by the VFS alone, once, on a file that `open_stream()` opened.
    unsafe extern "C" fn release_stream(
        _inode: *mut bindings::inode,
        file: *mut bindings::file,
    ) -> c_int {
        // SAFETY: from `open_stream()`, and nobody uses it any more.
        drop(unsafe { Pin::<KBox<T::Stream>>::from_foreign((*file).private_data) });
        0
    }
}

impl<T: Open + BinaryReader + Sync> Operations<T> {
    const STREAM_AND_WRITE: bindings::file_operations = bindings::file_operations {
        write: Some(Self::write),
        ..Self::STREAM
    };
}

impl<T: BinaryReader + Sync> Operations<T> {
    const WRITE: bindings::file_operations = bindings::file_operations {
        write: Some(Self::write),
        ..Self::COMMON
    };

    /// # Safety
    ///
    /// To be called by the VFS alone, on a file whose inode has a `T` for its private data.
    unsafe extern "C" fn write(
        file: *mut bindings::file,
        buffer: *const c_char,
        count: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: the inode stays while the file is open, and its private data is a `T` that lives
        // until the file is removed, which waits for this call.
        let data = unsafe { &*(*(*file).f_inode).i_private.cast::<T>() };
        // SAFETY: the VFS passes a position that is ours to change.
        let position: &mut file::Offset = unsafe { &mut *position };
        let buffer = UserPtr::from_ptr(buffer.cast_mut().cast());
        let mut reader = UserSlice::new(buffer, count).reader();

        as_count(data.read_from_slice(&mut reader, position))
    }
}

/// What the VFS wants to hear: a count of bytes or a negative errno.
fn as_count(result: Result<usize>) -> isize {
    match result.and_then(|count| Ok(isize::try_from(count)?)) {
        Ok(count) => count,
        Err(error) => error.to_errno() as isize,
    }
}

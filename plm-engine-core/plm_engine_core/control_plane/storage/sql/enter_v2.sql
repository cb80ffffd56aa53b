-- Binds the transaction to one tenant, which it answers. On a caller's own connection it refuses to move a transaction from
-- one tenant to another, and any isolation but READ COMMITTED: a snapshot older than the halt lock would miss a halt.
-- As version 1, but to be called in an assignment, which needs no statement as PERFORM does.
CREATE FUNCTION engine_enter_v2(p_tenant uuid) RETURNS uuid
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_bound text := NULLIF(current_setting('app.tenant_id', true), '');
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLI01', MESSAGE = format(
            'admission and settlement need READ COMMITTED, this transaction is %s',
            upper(current_setting('transaction_isolation')));
    END IF;
    IF v_bound IS NOT NULL AND v_bound::uuid <> p_tenant THEN
        RAISE EXCEPTION USING ERRCODE = 'PLT01', MESSAGE = 'this transaction is already bound to another tenant';
    END IF;
    RETURN set_config('app.tenant_id', p_tenant::text, true)::uuid;
END
$$;

-- Shared locks on the policy and on every halt scope above a proposal, in one statement. Whoever activates a policy or halts
-- takes theirs exclusively, so nothing that passed this line can commit after an activation or a halt that has committed.
-- The names are the contract with them. A scope that a run does not have is null, and a null takes no lock.
CREATE FUNCTION engine_lock_above_v3(p_tenant uuid, p_run uuid, p_group uuid, p_agent text, p_capability text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('policy', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/system', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/tenant/' || p_tenant, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/agent/' || p_tenant || '/' || p_agent, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run_group/' || p_group, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run/' || p_run, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/capability/' || p_tenant || '/' || p_capability, 0));
    RETURN true;
END
$$;

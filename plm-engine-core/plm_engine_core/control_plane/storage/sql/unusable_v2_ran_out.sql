-- Why a grant cannot be used. One that ran out has expired, also where it was closed for that.
CREATE OR REPLACE FUNCTION engine_unusable_v2(p_tenant uuid, p_run uuid, p_grant uuid, p_fencing bigint) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_grant grants;
BEGIN
    SELECT * INTO v_grant FROM grants WHERE tenant_id = p_tenant AND id = p_grant AND run_id = p_run;
    IF v_grant.id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = p_grant;
    ELSIF v_grant.fencing_token <> p_fencing THEN
        RAISE EXCEPTION USING ERRCODE = 'PLF01', MESSAGE = format(
            'grant %s belongs to an earlier holder of the lease of run %s', p_grant, p_run);
    ELSIF v_grant.state = 'revoked' THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'halted',
            'message', format('grant %s was revoked by a halt; its call has to be admitted anew', p_grant));
    ELSIF v_grant.state <> 'issued' AND NOT engine_ran_out_v1(v_grant) THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'grant_used',
            'message', format('grant %s is %s; a grant is used once', p_grant, v_grant.state));
    END IF;
    RETURN jsonb_build_object('status', 'refused', 'reason', 'grant_expired',
        'message', format('grant %s expired at %s before its call could start', p_grant, v_grant.expires_at));
END
$$;
